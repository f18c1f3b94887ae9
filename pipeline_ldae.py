"""transformers' pipelines with images as they are stored.

Its own convert every image to RGB before the image processor sees it, which clips 16 bits and drops transparency. These leave
that to an image processor that opens images itself, and treat those of other models as ever.
"""

from typing import Any

from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, Pipeline


class _AsStored(Pipeline):
    # where it may, transformers takes the image processor's code for a video processor's, and asks to run it
    _load_video_processor = False

    def preprocess(self, image: Any, timeout: float | None = None, **kwargs: Any):
        if not getattr(self.image_processor, "opens_images", False):
            return super().preprocess(image, timeout=timeout, **kwargs)
        image = self.image_processor.fetch_images(image, timeout)
        return self.image_processor(image, return_tensors="pt", **kwargs).to(self.dtype)


class LDAEImageFeatureExtractionPipeline(_AsStored, ImageFeatureExtractionPipeline):
    """`pipeline("image-feature-extraction")`."""


class LDAEImageClassificationPipeline(_AsStored, ImageClassificationPipeline):
    """`pipeline("image-classification")`."""


PIPELINES = {
    "image-feature-extraction": LDAEImageFeatureExtractionPipeline,
    "image-classification": LDAEImageClassificationPipeline,
}
