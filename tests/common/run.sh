#!/usr/bin/env bash
# transformers' own tests (ModelTesterMixin, BackboneTesterMixin, PipelineTesterMixin, ConfigTester) on the l-DAE classes.
# Upstream's tests are not installed with it: they come from the source package of the installed version, by pip.
# usage: tests/common/run.sh [pytest arguments]     needs: pip install -e ".[test]"
# SDIST=path   use that transformers-*.tar.gz instead of downloading it
# KEEP=folder  build the test tree there instead of in a temporary folder
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
tree=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$tree"' EXIT
version=$($python -c 'import importlib.metadata as m; print(m.version("transformers"))')
if [ -z "${SDIST:-}" ]; then
  $python -m pip download -q --no-deps --no-build-isolation --no-binary transformers -d "$tree/sdist" "transformers==$version"
  SDIST=$(ls "$tree"/sdist/transformers-*.tar.gz)
fi
tar xzf "$SDIST" -C "$tree" --strip-components=1 --wildcards 'transformers-*/tests/*.py'
cd "$tree"
mkdir -p src tests/{exporters,generation,pipelines,utils,models/ldae} tiny/reports
# the pipeline mixin reads tests/../src/transformers: that is the installed package
ln -sfn "$($python -c 'import importlib.util as u; print(u.find_spec("transformers").submodule_search_locations[0])')" src/transformers
touch tests/__init__.py tests/{exporters,generation,pipelines,utils,models,models/ldae}/__init__.py
# the source package has tests/*.py without its sub-packages: what the mixins import of them is stood in for here
echo 'class ExportTesterMixin: pass' >tests/exporters/test_export.py
echo 'class GenerationTesterMixin: pass' >tests/generation/test_utils.py
cat >tests/utils/test_configuration_utils.py <<'PY'
config_common_kwargs = {
    "return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16",
    "chunk_size_feed_forward": 5, "architectures": ["X"], "id2label": {0: "label"}, "label2id": {"label": "0"},
    "problem_type": "regression",
}
PY
cp "$here"/pipelines/*.py tests/pipelines/
cp "$here"/test_common_ldae.py tests/models/ldae/test_modeling_ldae.py
cp "$here"/upstream_conftest.py conftest.py
export PYTHONPATH="$tree:$here/../..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_TINY_MODEL_PATH="$tree/tiny"
echo '{}' >tiny/reports/tiny_model_summary.json
$python "$here/make_tiny.py" "$tree/tiny" >/dev/null
$python -m pytest tests/models/ldae -q -p no:cacheprovider --tb=short "$@" | tee report.txt
# upstream skips quietly what it thinks not applicable: see that it has not come to think so of everything
[ $# -gt 0 ] || grep -qE '1[0-9]{2} passed' report.txt
