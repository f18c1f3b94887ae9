"""l-DAE for Python: `train`, `embed`, `probe`. Importing it registers models, image processor and pipelines with transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)
from transformers.pipelines import PIPELINE_REGISTRY

from configuration_ldae import LDAEConfig
from image_processing_ldae import LDAEImageProcessor
from ldae.api import embed, probe, train
from modeling_ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from pipeline_ldae import PIPELINES

__version__ = "0.1.0"

AutoConfig.register("ldae", LDAEConfig, exist_ok=True)
AutoModel.register(LDAEConfig, LDAEModel, exist_ok=True)
AutoModelForPreTraining.register(LDAEConfig, LDAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(LDAEConfig, LDAEForImageClassification, exist_ok=True)
AutoBackbone.register(LDAEConfig, LDAEBackbone, exist_ok=True)
AutoImageProcessor.register(
    LDAEConfig, image_processor_classes={"torchvision": LDAEImageProcessor, "pil": LDAEImageProcessor}, exist_ok=True
)
for task, pipeline_class in PIPELINES.items():  # `register_pipeline` would warn that the task is known
    PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline_class

__all__ = [
    "LDAEBackbone",
    "LDAEConfig",
    "LDAEForImageClassification",
    "LDAEForPreTraining",
    "LDAEImageProcessor",
    "LDAEModel",
    "embed",
    "probe",
    "train",
]
