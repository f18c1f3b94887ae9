"""Saves the tiny checkpoints that upstream's pipeline mixin looks for. usage: make_tiny.py FOLDER"""

import json
import sys
from pathlib import Path

from tests.models.ldae.test_modeling_ldae import LDAEModelTest, LDAEModelTester
from transformers import ViTImageProcessor

root, tester, summary = Path(sys.argv[1]), LDAEModelTester(), {}
for cls in LDAEModelTest.pipeline_model_mapping.values():
    folder = root / "ldae" / cls.__name__
    cls(tester.get_config()).save_pretrained(folder)
    size = {"height": tester.image_size, "width": tester.image_size}
    ViTImageProcessor(size=size, do_convert_rgb=True).save_pretrained(folder)
    names = {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessor"], "model_classes": [cls.__name__]}
    summary[cls.__name__] = names
(root / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
