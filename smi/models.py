"""Models by name: the embedded ones, any timm name with tag, ``hf-hub:``, ``local-dir:``, and local checkpoints."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import resample_abs_pos_embed

from smi import embedded
from smi.errors import SmiError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

EMBEDDED = {"embedded:teacher": embedded.load_teacher, "embedded:judge": embedded.load_judge}


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = True,
) -> nn.Module:
    """A model in evaluation mode on the CPU.

    Args:
        name: ``embedded:teacher``, a timm name with or without tag (``deit_tiny_patch16_224.fb_in1k``),
            ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        checkpoint: ``.safetensors`` or ``.pth``/``.pt``/``.bin`` of that architecture, read without unpickling code;
            a state dict, alone or under ``model``, ``state_dict``, ``state_dict_ema`` or ``model_ema``.
        num_classes: length of the head; default the architecture's own.
        img_size: input size, for architectures that can change it; position embeddings of published weights and of
            `checkpoint` are interpolated to it (bicubic, as timm does).
        pretrained: fetch the published weights when no checkpoint is given; False leaves random weights. Embedded
            networks have theirs, and take none of these four options.

    Raises:
        SmiError: unknown name or tag, weights not to be had, checkpoint missing, unreadable or of another architecture.
    """
    if name in EMBEDDED:
        given = {"checkpoint": checkpoint, "num_classes": num_classes, "img_size": img_size}
        wrong = [option for option, value in given.items() if value is not None]
        wrong += [] if pretrained else ["pretrained=False (--no-pretrained)"]
        if wrong:
            raise SmiError(f"{name} is complete in itself, weights included; leave out {', '.join(wrong)}.")
        return EMBEDDED[name]()
    kwargs: dict[str, Any] = {}
    if num_classes is not None:
        if num_classes < 0:  # which timm takes for a head of none
            raise SmiError(f"num_classes is {num_classes}; expected the length of the head, or 0 for none.")
        kwargs["num_classes"] = num_classes
    if img_size is not None:
        kwargs["img_size"] = img_size
    from_registry = not name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if from_registry and "/" in name:
        raise SmiError(
            f"unknown model {name!r}; a model of the hub is named hf-hub:{name}, a folder of timm's local-dir:{name}, "
            f"and one that `smi quantize` has written, which `smi evaluate` takes, holds quantization.json."
        )
    if from_registry and not timm.is_model(name.split(".")[0]):
        raise SmiError(f"unknown model {name!r}.{did_you_mean(name, [*EMBEDDED, *timm.list_models()])}")
    try:
        model = timm.create_model(name, pretrained=pretrained and checkpoint is None, **kwargs)
    except (TypeError, AssertionError) as error:
        raise SmiError(f"{name} cannot be created with {kwargs or 'its defaults'}: {_first_line(error)}.") from error
    except Exception as error:  # hub clients raise their own families for missing, gated and unreachable weights
        if pretrained and checkpoint is None:
            raise SmiError(
                f"cannot get the published weights of {name!r}: {_first_line(error)}. Check the tag and the "
                f"connection, give a checkpoint, or ask for random weights with pretrained=False (--no-pretrained)."
            ) from error
        raise SmiError(f"cannot create {name!r}: {_first_line(error)}.") from error
    if checkpoint is not None:
        _load_checkpoint(model, name, Path(checkpoint), resample=img_size is not None)
    return model.eval()


def _load_checkpoint(model: Any, name: str, path: Path, resample: bool) -> None:
    state = read_state_dict(path)
    if resample and "pos_embed" in state and getattr(model, "pos_embed", None) is not None:
        state["pos_embed"] = _resampled(state["pos_embed"], model)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), _first_line(error))
        raise SmiError(
            f"the checkpoint {str(path)!r} is of another architecture than {name}: {detail.rstrip('.')}. "
            f"Name its own architecture, and num_classes and img_size if they differ from the default."
        ) from None
    if missing or unexpected:
        example = f"it lacks {missing[0]!r}" if missing else f"it has an unexpected {unexpected[0]!r}"
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected of {len(state)} entries"
        raise SmiError(
            f"the checkpoint {str(path)!r} is of another architecture than {name}: {example} ({counts}). "
            f"Name its own architecture."
        )


def _resampled(position: torch.Tensor, model: Any) -> torch.Tensor:
    """Position embeddings (1, prefix + cells, D) of a square grid for the model's own; any others as they are."""
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    cells = position.shape[1] - prefix if position.ndim == 3 else 0
    if cells < 1 or math.isqrt(cells) ** 2 != cells:
        return position
    resampled: torch.Tensor = resample_abs_pos_embed(
        position, list(model.patch_embed.grid_size), num_prefix_tokens=prefix
    )
    return resampled


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, by name. Never runs code from the file.

    Raises:
        SmiError: no such file, not a checkpoint, or one that needs unpickling.
    """
    if path.is_dir():
        raise SmiError(f"the checkpoint {str(path)!r} is a folder; name the file in it, or the model local-dir:{path}.")
    if not path.is_file():
        raise SmiError(f"there is no checkpoint {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SmiError(
            f"the checkpoint {str(path)!r} holds more than tensors and would have to run code to load; "
            f"save its state_dict, best as .safetensors."
        ) from None
    except Exception as error:
        raise SmiError(f"cannot read the checkpoint {str(path)!r}: {_first_line(error)}.") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items())
    ):
        raise SmiError(f"the checkpoint {str(path)!r} holds no state dict (names to tensors).")
    return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in loaded.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
