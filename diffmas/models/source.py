"""Whether a model can be had, found out before anything else is done."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from diffmas.embedded import embedded_path
from diffmas.models.gguf import gguf_of

#: Seconds to wait for the hub's answer.
_PATIENCE = 5
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_source(model: str | None, gguf_file: str | None = None) -> None:
    """Whether `model` is an embedded base (as None is), a folder, a GGUF file, in the hub's cache, or on the hub.

    Args:
        gguf_file: looked for in the folder.

    Raises:
        FileNotFoundError: it is none of these, or the hub does not answer.
        ValueError, ModuleNotFoundError: see :func:`~diffmas.models.gguf.gguf_of`.
    """
    found, named = gguf_of(model, gguf_file), f"model_name_or_path is {model!r}"
    if found is not None and (gguf_file is None or Path(found[0]).is_dir()):
        if not Path(*found).is_file():
            raise FileNotFoundError(f"{named}: no such file as {Path(*found)}; allowed: one in GGUF")
        return
    if embedded_path(model) is not None or (model and Path(model).is_dir()):
        return
    if not model:
        raise ValueError(f"{named}; allowed: a folder, an id of the hub, or none for the embedded base")
    path = Path(model)
    # "runs/mine", where there is a folder "runs", is meant to be in it.
    is_path = (
        _HUB_ID.fullmatch(model) is None
        or model.startswith(".")
        or path.exists()
        or path.parent.is_dir()
        and (path.parent != Path())
    )
    if is_path:
        raise FileNotFoundError(f"{named}: no such folder; allowed: a folder, or an id of the hub")
    if isinstance(try_to_load_from_cache(model, gguf_file or "config.json"), str):
        return
    if constants.is_offline_mode():
        raise FileNotFoundError(f"{named}: no such folder, not in the hub's cache, and offline mode is on")
    try:
        HfApi().model_info(model, timeout=_PATIENCE)
    except GatedRepoError:
        raise FileNotFoundError(f"{named}: access to it has to be asked for on the hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(f"{named}: no such folder, and no such model on the hub") from None
    except Exception as error:  # of the network, by whichever library the hub's client uses
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{named}: no such folder, not in the hub's cache, and the hub does not answer ({reason})"
        ) from None
