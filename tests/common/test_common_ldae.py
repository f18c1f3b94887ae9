"""transformers' common tests on the l-DAE classes; `run.sh` puts this file into upstream's test tree and runs it."""

import unittest

import torch
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from transformers.models.auto import modeling_auto

import configuration_ldae
from ldae import LDAEBackbone, LDAEConfig, LDAEForImageClassification, LDAEForPreTraining, LDAEModel

# the mixins look in these tables of names to decide which inputs (labels, say) a class is given
modeling_auto.MODEL_MAPPING_NAMES["ldae"] = "LDAEModel"
modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES["ldae"] = "LDAEForPreTraining"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["ldae"] = "LDAEForImageClassification"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["ldae"] = "LDAEBackbone"
# the mixins write these onto any configuration, then save and load it; LDAEConfig would refuse them as typos
configuration_ldae._KNOWN_EXTRAS |= {
    "tie_word_embeddings", "rms_norm_eps", "post_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon",
    "batch_norm_eps",
}  # fmt: skip


class LDAEModelTester:
    batch_size, num_channels, image_size, patch_size = 3, 3, 16, 4
    seq_length = (image_size // patch_size) ** 2
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    latent_dim, num_labels = 4, 3
    is_training = use_labels = True

    def __init__(self, parent=None):
        self.parent = parent

    def get_config(self):
        return LDAEConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            decoder_num_hidden_layers=1,
            latent_dim=self.latent_dim,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs(self):
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class LDAEModelTest(ModelTesterMixin, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (LDAEModel, LDAEForPreTraining, LDAEForImageClassification, LDAEBackbone)
    pipeline_model_mapping = {"image-feature-extraction": LDAEModel, "image-classification": LDAEForImageClassification}
    test_resize_embeddings = False  # there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = LDAEModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LDAEConfig, has_text_modality=False, hidden_size=48)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if model_class is LDAEForPreTraining:  # what it would draw; broadcasts over any batch size
            torch.manual_seed(0)
            inputs_dict["noise"] = torch.randn(1, self.model_tester.seq_length, self.model_tester.latent_dim)
            inputs_dict["timesteps"] = torch.tensor([500])
        return inputs_dict

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())

    @unittest.skip("an image model takes no inputs_embeds")
    def test_inputs_embeds(self):
        pass


class LDAEBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LDAEBackbone,)
    config_class = LDAEConfig
    has_attentions = True

    def setUp(self):
        self.model_tester = LDAEModelTester(self)
