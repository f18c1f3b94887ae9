"""l-DAE for Python. Importing it registers the configuration and the models with transformers' Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from configuration_ldae import LDAEConfig
from modeling_ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEModel

__version__ = "0.1.0"

AutoConfig.register("ldae", LDAEConfig, exist_ok=True)
AutoModel.register(LDAEConfig, LDAEModel, exist_ok=True)
AutoModelForPreTraining.register(LDAEConfig, LDAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(LDAEConfig, LDAEForImageClassification, exist_ok=True)
AutoBackbone.register(LDAEConfig, LDAEBackbone, exist_ok=True)
AutoImageProcessor.register(
    LDAEConfig, image_processor_classes={"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}, exist_ok=True
)

__all__ = ["LDAEBackbone", "LDAEConfig", "LDAEForImageClassification", "LDAEForPreTraining", "LDAEModel"]
