"""The studio's gradio page, with a `Session` for each visitor."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, guidance_call, load, preset_of
from shielded.runs.report import trace_plot
from shielded.studio.limits import OwnHostOnly, Server
from shielded.studio.session import COLUMNS, Result, Session, Settings

_LOG = logging.getLogger(__name__)
_EXPLAIN = (
    "An image is too near if its latents are closer than the radius to those of a protected image or of another image "
    "(L2 distance in the model's latent space). That is what SPELL keeps; it is not a promise that two pictures do not "
    "resemble each other."
)
_CSS = """
.pictures .grid-wrap {min-height: 0; max-height: none}
.trace svg {width: 100%; overflow: visible; font: 12px sans-serif}
.trace svg text {fill: currentColor}
.trace .band {fill: #5b8def; opacity: .25; stroke: none}
.trace .mean {fill: none; stroke: #5b8def; stroke-width: 2px}
.trace circle {fill: #5b8def}
.trace line {stroke: currentColor; opacity: .3}
"""
LAUNCH = {"css": _CSS, "max_file_size": "20mb", "share": False, "footer_links": ["api"]}


def build(model: str = DEFAULT_MODEL, device: str | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        model: argument of `shielded.models.load`; loaded once, for all visitors.
        device: device of the model.
    """
    pipe = load(model, device)
    preset = preset_of(model)
    options = guidance_call(pipe, model)
    space = LatentSpace.of(pipe)
    running = threading.Lock()  # one model, one sampling at a time
    server = Server()

    def opened(session: Session | None) -> Session:
        try:
            return session or Session(pipe, model, options, server)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def effect(radius: float, strength: float, end: float) -> str:
        acts = "to the end" if end == 0 else f"while the noise level is between 1 and {end:g}; later it may come back"
        way = "just to the edge" if strength == 1 else f"{strength:g} times the way to the edge"
        return (
            f"Keeps **{radius * space.dim**0.5:.1f}** (L2 in this model's latent space), {acts}. What comes closer is "
            f"moved {way} in each step."
        )

    def protect(session: Session | None, files: list[str] | None) -> tuple[Any, ...]:
        session = opened(session)
        paths = [_uploaded(file) for file in files or []]
        try:
            return _protection(session, lambda: session.protect_files(paths))
        finally:
            for path in paths:  # the session has what it needs of them
                Path(path).unlink(missing_ok=True)

    def protect_result(session: Session | None) -> tuple[Any, ...]:
        session = opened(session)
        return _protection(session, session.protect_result)

    def clear(session: Session | None) -> tuple[Any, ...]:
        session = opened(session)
        session.clear()
        return _protection(session, lambda: "nothing is protected.")

    def forget(session: Session | None) -> tuple[Session, str]:
        session = opened(session)
        session.forget()
        return session, _memory(session)

    def run(session: Session | None, *values: Any, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        session = opened(session)
        text, n, seed, steps, *rest = values
        settings = Settings(text, int(n), int(seed), int(steps), *rest)
        progress(0, desc="waiting for the model")
        with running:
            try:
                result = session.generate(
                    settings, lambda done, steps, what: progress((done, steps), desc=what, unit="steps")
                )
            except ValueError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None
            except Exception as error:  # a traceback in the log could quote the prompt
                _LOG.error("a run failed: %s", type(error).__name__)
                raise gr.Error(f"the run failed: {type(error).__name__}", print_exception=False) from None
        return session, *_shown(result, settings), _memory(session)

    gallery = {
        "columns": 2,
        "height": "auto",
        "object_fit": "contain",
        "interactive": False,
        "elem_classes": "pictures",
    }
    with gr.Blocks(title="shielded studio", delete_cache=(3600, 86400)) as page:
        session = gr.State(None, time_to_live=86400, delete_callback=lambda s: s and s.close())
        gr.Markdown(f"# shielded studio\n{_EXPLAIN}")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                prompt = gr.Textbox(label="Prompt", value=preset.prompt, autofocus=True)
                with gr.Row():
                    n = gr.Slider(1, 16, 4, step=1, label="Images")
                    seed = gr.Number(0, precision=0, label="Seed", minimum=0)
                with gr.Accordion("Keep away from", open=True):
                    files = gr.File(
                        label="Pictures to protect", file_count="multiple", file_types=["image"], height=120
                    )
                    shelf = gr.Gallery(
                        label="Protected", columns=4, height=160, object_fit="contain", interactive=False
                    )
                    status = gr.Markdown("Nothing is protected.", elem_id="status")
                    with gr.Row():
                        protect_made = gr.Button("Protect the images made without SPELL", size="sm")
                        clear_set = gr.Button("Protect nothing", size="sm")
                    apart = gr.Checkbox(True, label="The other images of the run")
                    remember = gr.Checkbox(True, label="The images of earlier runs")
                    memory = gr.Markdown("No earlier images.", elem_id="memory")
                    forget_all = gr.Button("Forget earlier runs", size="sm")
                with gr.Accordion("How", open=True):
                    radius = gr.Slider(0.1, 1.2, 0.25, step=0.01, label="Radius, per √dim")
                    strength = gr.Slider(1.0, 2.5, 1.6, step=0.1, label="Overcompensation λ")
                    end = gr.Slider(0.0, 0.9, 0.0, step=0.05, label="Act until noise level (0: to the end)")
                    effect_text = gr.Markdown(effect(0.25, 1.6, 0.0), elem_id="effect")
                    steps = gr.Slider(4, 60, preset.steps, step=1, label="Steps")
            with gr.Column(scale=2, min_width=320):
                go = gr.Button("Generate", variant="primary")
                summary = gr.Markdown(elem_id="summary")
                with gr.Row():
                    without = gr.Gallery(label="Without SPELL", **gallery)
                    with_ = gr.Gallery(label="With SPELL", **gallery)
                table = gr.Dataframe(headers=COLUMNS, interactive=False, label="Distances", elem_id="table")
                plot = gr.HTML(elem_classes="trace")
                archive = gr.File(label="Images, certificates and report", interactive=False)
        protected = [session, shelf, status, files]
        files.upload(protect, [session, files], protected)
        protect_made.click(protect_result, session, protected)
        clear_set.click(clear, session, protected)
        forget_all.click(forget, session, [session, memory])
        for slider in (radius, strength, end):
            slider.change(effect, [radius, strength, end], effect_text, show_progress="hidden")
        inputs = [session, prompt, n, seed, steps, radius, strength, end, apart, remember]
        outputs = [session, summary, without, with_, table, plot, archive, memory]
        gr.on([go.click, prompt.submit], run, inputs, outputs, concurrency_limit=1)
    return page


def serve(model: str = DEFAULT_MODEL, port: int = 7860, host: str = "127.0.0.1", device: str | None = None) -> None:
    """Serve the page until interrupted, also by SIGTERM; uploads are deleted then.

    Args:
        model: argument of `shielded.models.load`.
        port: port of the page.
        host: address to listen on; 127.0.0.1 is this machine alone.
        device: device of the model.
    """
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # warnings about long prompts quote them
    with tempfile.TemporaryDirectory(prefix="shielded-studio-") as folder, _until_terminated():
        tempfile.tempdir, before = folder, tempfile.tempdir  # sessions, too, end with the server
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        guard = Middleware(OwnHostOnly, host=host, port=port, uploads=Path(folder) / "uploads")  # pyright: ignore[reportArgumentType]
        try:
            page = build(model, device).queue()
            page.launch(server_name=host, server_port=port, app_kwargs={"middleware": [guard]}, **LAUNCH)
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _until_terminated() -> Iterator[None]:
    """End the block in order when the process is asked to terminate, as it is by Ctrl-C."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _uploaded(file: str) -> str:
    """Return the path of an uploaded file; a request may name any path, and others are refused."""
    path = Path(file).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("only uploaded files can be protected.")
    return str(path)


def _protection(session: Session, action: Any) -> tuple[Any, ...]:
    """Run an action and return the protected pictures with its message; errors are shown next to the pictures."""
    try:
        message = action()
    except ValueError as error:
        gr.Warning(str(error), duration=10)
        message = f"⚠ {error}"
    count = len(session.protected)
    status = f"{count} protected. {message[:1].upper()}{message[1:]}" if count else f"Nothing is protected. {message}"
    return session, session.pictures, status, None


def _memory(session: Session) -> str:
    count = len(session.history)
    return f"{count} earlier images are remembered." if count else "No earlier images."


def _shown(result: Result, settings: Settings) -> tuple[Any, ...]:
    names = [f"seed {settings.seed + i}" for i in range(settings.n)]
    kept = [(image, name) for image, name in zip(result.shielded, names, strict=True) if image is not None]
    return (
        result.summary,
        list(zip(result.plain, names, strict=True)),
        kept,
        result.rows,
        trace_plot(result.trace),
        str(result.archive),
    )
