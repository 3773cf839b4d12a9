"""The studio's gradio page, with a `Session` for each visitor."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL
from shielded.protected.ingest.pictures import IMAGE_SUFFIXES
from shielded.runs.report import trace_plot
from shielded.studio.choices import Choices
from shielded.studio.limits import OwnHostOnly, Server
from shielded.studio.request import MOST_PROMPTS, Settings, job_of
from shielded.studio.session import Session, copy_descriptor
from shielded.studio.shown import Result

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_EXPLAIN = (
    "An image is too near if its latents are closer than the radius to those of a protected image or of another image "
    "(L2 distance in the model's latent space). That is what SPELL keeps; it is not a promise that two pictures do not "
    "resemble each other."
)
_CSS = """
.pictures .grid-wrap {min-height: 0; max-height: none; height: auto; padding-top: 2rem; overflow: visible}
.pictures .grid-container {grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)) !important}
.pictures .thumbnail-item {aspect-ratio: auto; height: auto; min-width: 0}
.pictures .thumbnail-item img {object-fit: contain; height: auto}
.pictures .caption-label {position: static; display: block; max-width: 100%; white-space: normal; border: 0}
#bench {display: grid; grid-template: "ask results" auto "settings results" 1fr / minmax(0, 24rem) minmax(0, 1fr)}
#ask {grid-area: ask} #settings {grid-area: settings} #results {grid-area: results}
#bench > * {min-width: 0 !important; width: 100%}
@media (max-width: 56rem) {#bench {grid-template: "ask" auto "results" auto "settings" auto / minmax(0, 1fr)}}
#table .scroll {overflow-x: auto}
#table table {width: 100%; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums}
#table :is(th, td) {padding: .25rem .625rem; text-align: left; vertical-align: top; border: 0}
#table tbody tr:not(.below) {border-top: 1px solid var(--border-color-primary)}
#table .below td {padding-bottom: .5rem; color: var(--body-text-color) !important; opacity: .8}
.trace svg {width: 100%; overflow: visible; font: 12px sans-serif}
.trace svg text {fill: currentColor}
.trace .band {fill: #5b8def; opacity: .25; stroke: none}
.trace .mean {fill: none; stroke: #5b8def; stroke-width: 2px}
.trace circle {fill: #5b8def}
.trace line {stroke: currentColor; opacity: .3}
"""
LAUNCH = {"css": _CSS, "max_file_size": "20mb", "share": False, "footer_links": ["api"]}


def build(
    models: str | Sequence[str] = DEFAULT_MODEL, device: str | None = None, sets: Sequence[Path] = ()
) -> gr.Blocks:
    """Build the page.

    Args:
        models: names, as `shielded.models.load` takes them; visitors choose among them.
        device: device of the models.
        sets: folders of protected sets that visitors may keep away from.

    Raises:
        RequestError: a set is empty, or two have the same name.
        FileNotFoundError: there is no set at a path.
    """
    choices = Choices([models] if isinstance(models, str) else models, sets, device)
    first = choices.open(choices.models[0])
    first_space = LatentSpace.of(first.pipe)
    running = threading.Lock()  # one sampling at a time
    server = Server()
    threshold = copy_descriptor().threshold or 1.0

    def in_session(act: Callable[..., _T]) -> Callable[..., _T]:
        """Open a session for a visitor who has none, and close it if the act fails: the page would not learn of it."""

        @functools.wraps(act)
        def call(session: Session | None, *values: Any, **options: Any) -> _T:
            try:
                own = session or Session(first.pipe, first.name, first.options, server)
            except ValueError as error:
                raise _refusal(error) from None
            try:
                return act(own, *values, **options)
            except BaseException:
                if session is None:
                    own.close()
                raise

        return call

    def effect(session: Session | None, radius: float, strength: float, release: float, end: float) -> str:
        space = first_space if session is None else session.space
        acts = "to the end" if end == 0 else f"while the noise level is between 1 and {end:g}; later it may come back"
        way = "just to the edge" if strength == 1 else f"{strength:g} times the way to the edge"
        guided = "Guidance stays" if release == 1 else f"Its guidance is let go down to noise level {release:g}"
        return (
            f"Keeps **{radius * space.dim**0.5:.1f}** (L2 in this model's latent space), {acts}. What comes closer is "
            f"moved {way} in each step. {guided}."
        )

    def presets(session: Session, names: list[str]) -> tuple[Any, ...]:
        """Values of radius, λ and release: the library's for this job, and the radius of chosen sets."""
        protect = bool(names) or len(session.protected) > 0
        job = job_of(protect)
        given = choices.radius(names)
        radius = job["radius"] if given is None else round(given / session.space.dim**0.5, 3)
        return radius, job["overcompensation"], job["release"], choices.describe(names)

    @in_session
    def protect(session: Session, names: list[str], files: list[str] | None) -> tuple[Any, ...]:
        paths = [_uploaded(file) for file in files or []]
        try:
            return *_protection(session, lambda: session.protect_files(paths)), *presets(session, names)
        finally:
            for path in paths:  # the session has what it needs of them
                Path(path).unlink(missing_ok=True)

    @in_session
    def protect_result(session: Session, names: list[str]) -> tuple[Any, ...]:
        return *_protection(session, session.protect_result), *presets(session, names)

    @in_session
    def clear(session: Session, names: list[str]) -> tuple[Any, ...]:
        session.clear()
        return *_protection(session, lambda: ""), *presets(session, names)

    @in_session
    def choose(session: Session, model: str, names: list[str]) -> tuple[Any, ...]:
        """Go on with another model or other sets."""
        try:
            chosen = choices.open(model)
            session.use(chosen.pipe, chosen.name, chosen.options)
            values = presets(session, names)
        except (ValueError, OSError) as error:
            raise _refusal(error) from None
        return *_protection(session, lambda: ""), *values, chosen.preset.steps, _memory(session)

    @in_session
    def forget(session: Session) -> tuple[Session, str]:
        session.forget()
        return session, _memory(session)

    @in_session
    def run(session: Session, names: list[str], copies: float, *values: Any, progress: Any) -> tuple[Any, ...]:
        text, n, seed, steps, *rest = values
        settings = Settings(text, int(n), int(seed), int(steps), *rest)
        progress(0, desc="waiting for the model")
        with running:
            try:
                session.find_copies_from(copies if copies < 1 else None)
                result = session.generate(
                    settings,
                    lambda done, steps, what: progress((done, steps), desc=what, unit="steps"),
                    choices.paths(names),
                )
            except ValueError as error:
                raise _refusal(error) from None
            except Exception as error:  # a traceback in the log could quote the prompt
                _LOG.error("a run failed: %s", type(error).__name__)
                raise gr.Error(f"the run failed: {type(error).__name__}", print_exception=False) from None
        return session, *_shown(result), session.made, _memory(session)

    def started(session, names, copies, *values, progress=gr.Progress()):  # noqa: B008
        return run(session, names, copies, *values, progress=progress)

    with gr.Blocks(title="shielded studio", delete_cache=(3600, 86400)) as page:
        session = gr.State(None, time_to_live=86400, delete_callback=lambda s: s and s.close())
        gr.Markdown(f"# shielded studio\n{_EXPLAIN}")
        with gr.Row(elem_id="bench"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(
                    label=f"Prompts, one a line (at most {MOST_PROMPTS})",
                    value=first.preset.prompt,
                    lines=2,
                    autofocus=True,
                )
                go = gr.Button("Generate", variant="primary")
            with gr.Column(elem_id="settings"):
                with gr.Row():
                    n = gr.Slider(1, 16, 4, step=1, label="Images of each prompt")
                    seed = gr.Number(0, precision=0, label="Seed", minimum=0)
                model = gr.Dropdown(choices.models, value=first.name, label="Model", visible=len(choices.models) > 1)
                with gr.Accordion("Keep away from", open=True):
                    chosen = gr.Dropdown(
                        list(choices.sets),
                        value=[],
                        multiselect=True,
                        label="Protected sets",
                        visible=bool(choices.sets),
                        elem_id="sets",
                    )
                    about = gr.Markdown(elem_id="about")
                    files = gr.File(
                        label="Pictures to protect",
                        file_count="multiple",
                        file_types=["image", *IMAGE_SUFFIXES],  # browsers do not know that .heic is a picture
                        height=120,
                    )
                    shelf = gr.Gallery(label="Protected", **_gallery(4), visible=False, elem_id="shelf")
                    status = gr.Markdown("Nothing is protected.", elem_id="status")
                    with gr.Row():
                        protect_made = gr.Button("Protect the images made without SPELL", size="sm")
                        clear_set = gr.Button("Protect nothing", size="sm")
                    copies = gr.Slider(
                        0.5, 1, threshold, step=0.001, label="Your pictures: copy from this similarity (1: never)"
                    )
                    apart = gr.Checkbox(True, label="The other images of the run")
                    remember = gr.Checkbox(True, label="The images of earlier runs")
                    memory = gr.Markdown("No earlier images.", elem_id="memory")
                    forget_all = gr.Button("Forget earlier runs", size="sm")
                with gr.Accordion("How", open=True):
                    job = job_of(protect=False)
                    radius = gr.Slider(0.1, 1.2, job["radius"], step=0.001, label="Radius, per √dim")
                    strength = gr.Slider(1.0, 4.0, job["overcompensation"], step=0.1, label="Overcompensation λ")
                    release = gr.Slider(
                        0.0, 1.0, job["release"], step=0.05, label="Let guidance go down to noise level (1: never)"
                    )
                    end = gr.Slider(0.0, 0.9, 0.0, step=0.05, label="Act until noise level (0: to the end)")
                    effect_text = gr.Markdown(
                        effect(None, job["radius"], job["overcompensation"], job["release"], 0.0), elem_id="effect"
                    )
                    steps = gr.Slider(1, 60, first.preset.steps, step=1, label="Steps")
            with gr.Column(elem_id="results"):
                summary = gr.Markdown("What you generate is shown here.", elem_id="summary")
                compare = gr.ImageSlider(
                    label="Without SPELL | with SPELL",
                    visible=False,
                    interactive=False,
                    max_height=420,
                    elem_id="compare",
                )
                with gr.Row():
                    without = gr.Gallery(label="Without SPELL", **_gallery(4), allow_preview=False, visible=False)
                    with_ = gr.Gallery(label="With SPELL", **_gallery(4), allow_preview=False, visible=False)
                table = gr.HTML(elem_id="table", visible=False)
                archive = gr.File(label="Images, certificates and report", interactive=False, visible=False)
                with gr.Accordion("While sampling", open=False, visible=False) as sampling:
                    plot = gr.HTML(elem_classes="trace")
                with gr.Accordion("All pictures of this session", open=False, visible=False) as album:
                    made = gr.Gallery(label="Newest first", **_gallery(6), elem_id="made")
        protected = [session, shelf, status, files, radius, strength, release, about]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        files.upload(protect, [session, chosen, files], protected, show_progress_on=status)
        protect_made.click(protect_result, [session, chosen], protected, show_progress_on=status)
        clear_set.click(clear, [session, chosen], protected, **quiet)
        gr.on(
            [model.input, chosen.input],
            choose,
            [session, model, chosen],
            [*protected, steps, memory],
            show_progress_on=status,
            trigger_mode="always_last",
        )
        forget_all.click(forget, session, [session, memory], **quiet)
        for slider in (radius, strength, release, end):
            slider.change(effect, [session, radius, strength, release, end], effect_text, **quiet)
        inputs = [session, chosen, copies, prompt, n, seed, steps, radius, strength, release, end, apart, remember]
        outputs = [session, summary, compare, without, with_, table, archive, sampling, plot, album, made, memory]
        go.click(started, inputs, outputs, concurrency_limit=1, show_progress_on=summary)
        for gallery in (without, with_):
            gallery.select(_pair, [without, with_], compare, **quiet)
    return page


def serve(
    models: str | Sequence[str] = DEFAULT_MODEL,
    port: int = 7860,
    host: str = "127.0.0.1",
    device: str | None = None,
    sets: Sequence[Path] = (),
) -> None:
    """Serve the page until interrupted, also by SIGTERM; uploads are deleted then.

    Args:
        models: names, as `shielded.models.load` takes them; visitors choose among them.
        port: port of the page.
        host: address to listen on; 127.0.0.1 is this machine alone.
        device: device of the models.
        sets: folders of protected sets that visitors may keep away from.
    """
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # warnings about long prompts quote them
    with tempfile.TemporaryDirectory(prefix="shielded-studio-") as folder, _until_terminated():
        tempfile.tempdir, before = folder, tempfile.tempdir  # sessions, too, end with the server
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        guard = Middleware(OwnHostOnly, host=host, port=port, uploads=Path(folder) / "uploads")  # pyright: ignore[reportArgumentType]
        try:
            page = build(models, device, sets).queue()
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


def _refusal(error: Exception) -> gr.Error:
    text = str(error)
    return gr.Error(f"{text[:1].upper()}{text[1:]}", duration=None, print_exception=False)


def _protection(session: Session, action: Callable[[], str]) -> tuple[Any, ...]:
    """Run an action and return the protected pictures with its message; errors are shown next to the pictures."""
    try:
        message = action()
    except ValueError as error:
        gr.Warning(str(error), duration=10)
        message = f"⚠ {error}"
    count = len(session.protected)
    status = f"{count} of your pictures protected." if count else "None of your pictures is protected."
    shelf = gr.Gallery(value=session.pictures, visible=bool(count))
    return session, shelf, f"{status} {message[:1].upper()}{message[1:]}".strip(), None


def _memory(session: Session) -> str:
    count = len(session.history)
    return f"{count} earlier images are remembered." if count else "No earlier images."


def _gallery(columns: int) -> dict[str, Any]:
    """Options of a gallery that shows its pictures whole."""
    return {
        "columns": columns,
        "height": "auto",
        "object_fit": "contain",
        "interactive": False,
        "elem_classes": "pictures",
    }


def _shown(result: Result) -> tuple[Any, ...]:
    kept = [(image, name) for image, name in zip(result.shielded, result.names, strict=True) if image is not None]
    several = len(result.plain) > 1
    first = (result.plain[0], result.shielded[0] or result.plain[0])
    plot = trace_plot(result.trace)
    return (
        result.summary,
        gr.ImageSlider(value=first, visible=True),
        gr.Gallery(value=list(zip(result.plain, result.names, strict=True)), visible=several),
        gr.Gallery(value=kept, visible=several and bool(kept)),
        gr.HTML(value=result.table, visible=True),
        gr.File(value=str(result.archive), visible=True),
        gr.Accordion(visible=bool(plot)),
        plot,
        gr.Accordion(visible=True),
    )


def _pair(before: list[Any], after: list[Any], event: gr.SelectData) -> Any:
    """Put the pictures of a chosen name into the comparison; a refused one has only its plain picture."""
    name = event.value["caption"]
    found = [next((image for image, caption in side or [] if caption == name), None) for side in (before, after)]
    left, right = found[0] or found[1], found[1] or found[0]
    return gr.ImageSlider(value=(left, right))
