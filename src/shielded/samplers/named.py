"""Exchange a pipeline's scheduler for another one, by its name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from shielded._extras import RequestError
from shielded.samplers.coefficients import REFUSED, SUPPORTED

_SPACINGS = ("leading", "linspace", "trailing")


def use_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another scheduler, with the noise schedule of its own.

    Args:
        pipe: a diffusers pipeline.
        name: class of diffusers, with or without "Scheduler" at its end, in upper or lower case: `ddim`. Behind a colon
            may stand how it spaces its timesteps: `euler:trailing`, as models of few steps want it.

    Raises:
        RequestError: the name is unknown, the scheduler cannot be corrected, or it does not fit the model.
    """
    import diffusers

    name, colon, spacing = name.partition(":")
    if colon and spacing not in _SPACINGS:
        raise RequestError(f"timesteps are spaced {', '.join(_SPACINGS[:-1])} or {_SPACINGS[-1]}, not {spacing!r}.")
    known = {key.lower().removesuffix("scheduler"): key for key in [*SUPPORTED, *REFUSED]}
    for short in ("discrete", "multistep"):
        known |= {key.replace(short, ""): value for key, value in known.items() if key.replace(short, "") not in known}
    wanted = name.lower().removesuffix("scheduler")
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, 3)
        hint = (
            f"did you mean {' or '.join(known[key] for key in close)}?" if close else "docs/schedulers.md lists them."
        )
        raise RequestError(f"there is no scheduler {name}; {hint}")
    chosen = known[wanted]
    if chosen in REFUSED:
        reason, instead = REFUSED[chosen]
        raise RequestError(f"{chosen} is not supported: {reason}; {instead}.")
    current = pipe.scheduler
    flows = "Flow" in chosen or chosen.startswith("LTX")
    flow_model = "Flow" in type(current).__name__ or current.config.get("prediction_type") == "flow_prediction"
    if flows != flow_model and not (flow_model and "use_flow_sigmas" in _options(getattr(diffusers, chosen))):
        raise RequestError(f"{chosen} does not fit this model, which has {type(current).__name__}.")
    more: dict[str, Any] = (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow_model and not flows else {}
    )
    if colon:
        if "timestep_spacing" not in _options(getattr(diffusers, chosen)):
            raise RequestError(f"{chosen} has one way alone to space its timesteps; leave out :{spacing}.")
        more["timestep_spacing"] = spacing
    try:
        pipe.scheduler = getattr(diffusers, chosen).from_config(current.config, **more)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise RequestError(f"{chosen} does not fit this model: {str(error).strip().splitlines()[0]}") from None


def _options(scheduler: Any) -> set[str]:
    return set(inspect.signature(scheduler.__init__).parameters)
