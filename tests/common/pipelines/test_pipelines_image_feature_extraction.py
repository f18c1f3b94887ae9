"""What upstream's pipeline mixin drives: a feature-extraction pipeline on small random images."""

import unittest

import numpy as np
from PIL import Image
from transformers import ImageFeatureExtractionPipeline


class ImageFeatureExtractionPipelineTests(unittest.TestCase):
    pipeline_class = ImageFeatureExtractionPipeline

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **kwargs):
        pixels = np.random.RandomState(0).randint(0, 255, (2, 40, 30, 3), dtype="uint8")
        images = [Image.fromarray(image) for image in pixels]
        return self.pipeline_class(model=model, image_processor=image_processor, dtype=dtype), images

    def run_pipeline_test(self, pipe, examples):
        self.assertEqual(len(pipe(examples[0])), 1)
        self.assertEqual(len(pipe(examples)), 2)
        self.assertEqual(np.array(pipe(examples[0], pool=True)).shape, (1, pipe.model.config.hidden_size))
