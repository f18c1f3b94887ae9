"""The options that configure the model, made from the fields, the annotations and the docstring of LDAEConfig."""

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args

from configuration_ldae import SIZES, LDAEConfig
from ldae.options.declaration import option

MODEL = "Model"


class _ModelOptions:
    """What `ModelArguments` can do beside holding its options."""

    model_size: str

    def overrides(self) -> dict[str, Any]:
        """The options that were given, as fields of LDAEConfig."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "model_size"}
        for name in ("image_size", "patch_size"):
            if name in given and len(given[name]) == 1:
                given[name] = given[name][0]
        return given

    def config(self) -> LDAEConfig:
        """The configuration: the named size with the options that were given.

        Raises:
            huggingface_hub.errors.StrictDataclassError: for options that contradict each other.
        """
        return LDAEConfig.from_size(self.model_size, **self.overrides())


def _model_arguments() -> type:
    """A dataclass of the options that configure the model: `model_size` and every documented field of LDAEConfig."""
    documented = r"^    (\w+) \(.*?(?:defaults to (.*))?\):\n((?:        .*(?:\n|\Z))+)"
    texts = {}
    for name, default, text in re.findall(documented, inspect.getdoc(LDAEConfig) or "", re.MULTILINE):
        default = "that of model_size" if name in SIZES["tiny"] else default
        text = f"{text} (default: {default})" if default else text
        texts[name] = " ".join(text.split()).replace("`", "")
    size = option("tiny", "Named size of the encoder; the decoder is as large.", group=MODEL)
    options = [("model_size", Literal[tuple(SIZES)], size)]
    for name, annotation in LDAEConfig.__annotations__.items():
        if name in texts:
            options.append((name, _one_type(annotation) | None, option(None, texts[name], group=MODEL)))
    namespace = {"__doc__": _model_arguments.__doc__, "__module__": __name__}
    return dataclasses.make_dataclass("ModelArguments", options, bases=(_ModelOptions,), namespace=namespace)


def _one_type(annotation: Any) -> Any:
    """The type of an option for a field of LDAEConfig, which may allow several."""
    allowed = get_args(annotation)
    if list[int] in allowed:
        return list[int]
    return next((kind for kind in (float, dict) if kind in allowed), annotation)


ModelArguments = _model_arguments()
