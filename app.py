"""A page on which anyone can drop an image and see what an l-DAE makes of it: `python app.py --model FOLDER`.

docs/demo.md says more, and how the page becomes a Hugging Face Space. `pip install -e ".[demo]"` installs Gradio.
"""

import base64
import html
import io
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported; nothing leaves the machine

try:
    import gradio as gr
except ImportError:
    raise SystemExit('app.py: error: Gradio is not installed; pip install -e ".[demo]"') from None
import torch
from PIL import Image

from ldae.data.photos import photograph_path
from ldae.demo.space import MODEL_FOLDER, write_space
from ldae.demo.uploads import read_upload
from ldae.demo.views import Views, load_views
from ldae.mistakes import run_command
from ldae.names import short_name
from ldae.options import option, option_parser

ROOT = Path(__file__).resolve().parent
EXAMPLES = (
    "sklearn/china.jpg",
    "sklearn/flower.jpg",
    "skimage/coffee.png",
    "skimage/chelsea.png",
    "skimage/astronaut.png",
)
MAX_FILE_SIZE = "32mb"
PERCENT = 100


def default_model() -> str:
    """The model that lies beside this file in a Space, or else the one that the repository holds."""
    in_space = sorted((ROOT / MODEL_FOLDER).glob("*/"))
    return str(in_space[0] if in_space else ROOT / "model_cards" / "ldae-vit-small-tiny-imagenet64")


@dataclass
class DemoArguments:
    model: str = option(default_model(), "An l-DAE's folder or Hub id. Code that comes with it is not run.")
    features: str | None = option(
        None,
        "A folder that ldae-features has written with this model: the nearest images are looked for among its images. By "
        "default they are crops of the embedded photographs.",
    )
    host: str | None = option(None, "Address to listen at; by default 127.0.0.1, which this machine alone reaches.")
    port: int | None = option(
        None, "Port to listen at; by default the first free one from 7860.", minimum=0, maximum=65535
    )
    space: str | None = option(
        None, "Write a folder that can be uploaded as a Hugging Face Space, with this model, and end."
    )


STYLE = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container img { image-rendering: pixelated; }
#upload img, #examples img { image-rendering: auto; }
#head h1 { font-size: 2.2rem; letter-spacing: -0.02em; margin: 0.4rem 0 0; }
#head p { font-size: 1.05rem; margin: 0; }
#head p, .section p, .note p, .strip figcaption { color: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
#message { border-left: 4px solid #d9822b; background: color-mix(in srgb, #d9822b 14%, transparent); border-radius: 6px;
  padding: 0.6rem 0.9rem !important; }
#examples { min-height: 0; }
#examples .grid-container { grid-template-columns: repeat(5, 1fr) !important; gap: 6px; padding-top: 30px;
  grid-auto-rows: auto !important; }
#examples .grid-wrap { min-height: 0; overflow: hidden; }
#examples .gallery-item, #examples .thumbnail-item { min-width: 0; width: 100%; }
#examples .thumbnail-item { aspect-ratio: 1; height: auto; border-radius: 8px; }
.html-container { padding: 0 !important; }
#sigma input[type="number"], #percent input[type="number"] { width: 4.6rem; }
.picture { gap: 0.35rem !important; }
.note p { font-size: 0.88rem; line-height: 1.35; margin: 0; }
.section h2, .section h3 { margin: 0; }
.section h2 { font-size: 1.15rem; margin-top: 0.5rem; }
.section h3 { font-size: 1rem; }
.section p { font-size: 0.95rem; margin: 0.1rem 0 0; }
.strip { display: grid; grid-template-columns: repeat(8, 1fr); gap: 10px; }
.strip figure { margin: 0; min-width: 0; }
.strip img { width: 100%; border-radius: 8px; display: block; }
.strip figcaption { font-size: 0.78rem; text-align: center; margin-top: 3px;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
@media (max-width: 760px) { .strip { grid-template-columns: repeat(4, 1fr); } }
"""
PLEX = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # Gradio's file of the weight 600 lacks letters
FONTS = [PLEX, "system-ui", "sans-serif"]


def strip(pictures: list[tuple[Image.Image, str]]) -> str:
    """Pictures in rows of eight, with a caption below each, as HTML."""
    figures = []
    for picture, caption in pictures:
        file, text = io.BytesIO(), html.escape(caption)
        picture.save(file, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        figures.append(f'<figure><img src="{source}" alt=""><figcaption title="{text}">{text}</figcaption></figure>')
    return f'<div class="strip">{"".join(figures)}</div>'


def _path_of(payload: Any) -> str | None:
    """The path of an uploaded file, as it is."""
    return None if payload is None else payload.path


class Page:
    """The page of one model: its parts, and what happens when they are touched."""

    def __init__(self, views: Views, name: str):
        self.views, self.name = views, name
        self.seen = round(PERCENT * views.config.keep_ratio)  # at first: as in training
        self.examples = [str(photograph_path(example)) for example in EXAMPLES]

    # ------------------------------------------------------------------------------------------------------------ events

    def read(self, path: str | None) -> tuple:
        """(pixel values, an emptied drop area, the message) of an upload; what cannot be read leaves the page as it is."""
        try:
            pixel_values = read_upload(path or "", self.views.encoder.image_hw, self.views.encoder.num_channels)
        except ValueError as error:
            return gr.skip(), None, gr.update(value=str(error), visible=True)
        return pixel_values, None, gr.update(visible=False)

    def read_example(self, chosen: gr.SelectData) -> tuple:
        """`read` of the example that was chosen."""
        return self.read(self.examples[chosen.index])

    def denoise(self, pixel_values: torch.Tensor, sigma: float, percent: float) -> tuple[Image.Image, Image.Image, str]:
        """The noisy and the denoised picture of an image (1, C, H, W) and their caption; `percent` of the patches are seen."""
        return self.views.denoise(pixel_values, sigma, percent / PERCENT)

    def look(self, pixel_values: torch.Tensor) -> tuple[Image.Image, Image.Image, str]:
        """What does not depend on the noise: the clean image, its patches in colours, the nearest images."""
        views = self.views
        return views.picture(pixel_values), views.colours(pixel_values), strip(views.nearest(pixel_values))

    # ------------------------------------------------------------------------------------------------------------- parts

    def blocks(self) -> gr.Blocks:
        """The whole page, on which the first example is shown."""
        first, _, _ = self.read(self.examples[0])
        with gr.Blocks(title="l-DAE", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            self.pixel_values = gr.State(first)
            gr.Markdown(
                "# l-DAE\nA network that learned to see, without labels, by removing noise from images. "
                f"Drop an image, and see what **{self.name}** makes of it.",
                elem_id="head",
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._controls()
                with gr.Column(scale=3, min_width=480):
                    self._pictures(first)
                    self._nearest(first)
                    self._filters()
                    gr.Markdown(
                        "The method is that of [Deconstructing Denoising Diffusion Models for Self-Supervised Learning]"
                        "(https://arxiv.org/abs/2401.14404). Images stay on the machine that runs this page.",
                        elem_classes="note",
                    )
            self._connect()
        return blocks

    def _controls(self):
        self.upload = gr.Image(label="Your image", sources=["upload", "clipboard"], height=180, elem_id="upload")
        # in place of Gradio's own decoding, which fails on broken files and clips 16 bits
        self.upload.preprocess = _path_of
        self.message = gr.Markdown(visible=False, elem_id="message")
        self.chosen = gr.Gallery(
            self.examples,
            label="Or one of these",
            allow_preview=False,
            buttons=[],
            object_fit="cover",
            elem_id="examples",
        )
        low, high = self.views.sigmas or (0.0, 1.0)
        self.sigma = gr.Slider(
            round(low, 2), round(high, 2), round(0.4 * high, 2), step=0.01, label="Noise σ", elem_id="sigma", buttons=[],
            info="How strong the noise is.", visible=self.views.sigmas is not None,
        )  # fmt: skip
        self.percent = gr.Slider(
            1, PERCENT, self.seen, step=1, label="Patches seen, in %", elem_id="percent", buttons=[],
            info=f"The decoder fills in the others. It was trained with {self.seen} %.", visible=self.views.drops_tokens,
        )  # fmt: skip

    def _pictures(self, first: torch.Tensor):
        height, width = self.views.encoder.image_hw
        denoises = self.views.denoiser is not None
        noisy, denoised, caption = self.denoise(first, self.sigma.value, self.seen) if denoises else (None, None, "")
        with gr.Row():
            self.clean = self._picture(
                "Clean", self.views.picture(first), f"All that the model sees: {width}\u00a0×\u00a0{height} pixels."
            )
            gaps = " Gaps are not seen." if self.views.drops_tokens else ""
            note = f"Noise is added to the {self.views.config.latent_dim} numbers that stand for a patch.{gaps}"
            self.noisy = self._picture("Noisy", noisy, note, denoises)
            self.denoised = self._picture("Denoised", denoised, "The clean image, predicted in one step.", denoises)
            self.coloured = self._picture(
                "Features", self.views.colours(first), "Like colours are like features, by three principal components."
            )
        self.caption = gr.Markdown(caption, elem_id="caption", visible=denoises, elem_classes="note")

    def _picture(self, title: str, value: Image.Image | None, note: str, visible: bool = True) -> gr.Image:
        """A picture below its title and above a sentence."""
        with gr.Column(min_width=150, visible=visible, elem_classes="picture"):
            gr.Markdown(f"### {title}", elem_classes="section")
            picture = gr.Image(
                value,
                show_label=False,
                interactive=False,
                buttons=[],
                format="png",
                elem_id=title.lower(),
                alt_text=title,
            )
            gr.Markdown(note, elem_classes="note")
        return picture

    def _nearest(self, first: torch.Tensor):
        reference = self.views.reference
        gr.Markdown(
            f"## Nearest images\nOf {len(reference.indices):,} {reference.title}, those whose features are the most like this "
            "image's, with the cosine of the angle between them.",
            elem_classes="section",
        )
        self.neighbours = gr.HTML(strip(self.views.nearest(first)), elem_id="nearest", padding=False)

    def _filters(self):
        filters, held = self.views.filters(), self.views.variance_held
        if not filters:
            return
        config = self.views.config
        height, width = config.patch_hw
        kind = "PCA filters" if held is not None else "Filters"
        part = "" if held is None else f" Together they hold {held:.0%} of the patches' variance."
        gr.Markdown(
            f"## {kind}\nThe model describes a patch of {width} × {height} pixels by {config.latent_dim} numbers, which say how "
            f"much it has of each of these patterns.{part}",
            elem_classes="section",
        )
        gr.HTML(strip(filters), elem_id="filters", padding=False)

    def _connect(self) -> None:
        """Says what follows from what."""
        read = [self.pixel_values, self.upload, self.message]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for reading in (
            self.upload.upload(self.read, self.upload, read, **quiet),
            self.chosen.select(self.read_example, None, read, **quiet),
        ):
            looking = reading.then(self.look, self.pixel_values, [self.clean, self.coloured, self.neighbours], **quiet)
            if self.views.denoiser is not None:
                looking.then(self.denoise, *self._noise(), **quiet)
        if self.views.denoiser is not None:
            gr.on(
                [self.sigma.change, self.percent.change],
                self.denoise,
                *self._noise(),
                trigger_mode="always_last",
                **quiet,
            )

    def _noise(self) -> tuple[list, list]:
        """The inputs and the outputs of `denoise`."""
        return [self.pixel_values, self.sigma, self.percent], [self.noisy, self.denoised, self.caption]


def validate_address(host: str | None, port: int | None) -> None:
    """Checks that the page can listen at an address, since Gradio tries some wrong ones without an end.

    Raises:
        ValueError: if it cannot, since the address is not this machine's or is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "127.0.0.1", port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:  # a name that is too long is no name
        where = f"--host {host} --port {port}"
        raise ValueError(f"the page cannot listen at {where}; choose others, or leave them out ({error})") from error


def main(argv: list[str] | None = None) -> None:
    """Shows the page until Ctrl-C, or writes a Space.

    Raises:
        FileNotFoundError, ValueError: as `validate_address`, `load_views` and `write_space` do.
    """
    parser = option_parser(DemoArguments, description=__doc__.split(":")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    if options.space is not None:
        print(write_space(options.space, options.model))
        return
    validate_address(options.host, options.port)
    page = Page(load_views(options.model, options.features), short_name(options.model)).blocks().queue(max_size=32)
    _, address, _ = page.launch(
        server_name=options.host, server_port=options.port, share=False, ssr_mode=False, footer_links=[], quiet=True,
        max_file_size=MAX_FILE_SIZE, css=STYLE, prevent_thread_lock=True,
        theme=gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS),
    )  # fmt: skip
    print(f"The page is at {address} and Ctrl-C ends it.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_command(main)
