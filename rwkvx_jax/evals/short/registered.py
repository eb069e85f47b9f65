"""The model type `rwkvx` of lm-evaluation-harness; importing this module registers it.

lm_eval finds model types in its own list and among those that were registered before it looks, and
no others: it reads no entry points. `rwkvx-lm-eval` imports this module and goes on as `lm_eval`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import jax
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.models import Selector, load_model
from rwkvx_jax.evals.short.answers import Answers
from rwkvx_jax.evals.short.harness import HarnessModel
from rwkvx_jax.storage import work_path

_LM_EVAL_DEVICE = "cuda:0"  # what it says where nobody chose one


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What --model_args takes, and what lm_eval adds to it.

    Attributes:
      checkpoint: as of eval.py.
      pretrained: another name for it, by which lm_eval calls its folder of results.
      piece, chunk_size, top_k, selector, vocab_file: as of eval.py.
      batch_size: texts read side by side; "auto": as many as eval.py reads.
      max_batch_size: must be absent.
      device: JAX's own, or absent, for which lm_eval says "cuda:0".
    """

    checkpoint: str = ""
    pretrained: str = ""
    piece: int = 2048
    chunk_size: int | None = None
    top_k: int | None = None
    selector: str | None = None
    vocab_file: str = ""
    batch_size: int | str | None = None
    max_batch_size: int | None = None
    device: str | None = None

    def __post_init__(self):
        if bool(self.checkpoint) == bool(self.pretrained):
            raise ConfigError(
                "--model_args: name one model, with checkpoint=PATH or pretrained=PATH"
            )
        for name in ("piece", "chunk_size", "top_k"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"--model_args {name} is {value!r}: it must be at least 1")
        if self.selector not in (None, *get_args(Selector)):
            known = ", ".join(get_args(Selector))
            raise ConfigError(f"--model_args selector is {self.selector!r}: it is one of {known}")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"--batch_size is {self.batch_size!r}: give a number, or auto")
        if self.max_batch_size is not None:
            raise ConfigError("--max_batch_size means nothing here: give --batch_size")
        own = jax.default_backend()
        if self.device not in (None, _LM_EVAL_DEVICE, own):
            raise ConfigError(
                f"--device is {self.device!r}, and JAX computes on {own!r}: leave it out, and "
                "choose another one with JAX_PLATFORMS"
            )

    @property
    def rows(self) -> int | None:
        """Texts side by side, as a number; None: as many as fit, 0: no number."""
        if self.batch_size in (None, "auto"):
            return None
        return int(self.batch_size) if str(self.batch_size).isdecimal() else 0

    @classmethod
    def of(cls, given: dict[str, Any]) -> Arguments:
        """Arguments by name.

        Raises:
          ConfigError: an unknown name, or a value out of bounds.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(
                f"--model_args has {', '.join(unknown)}: rwkvx takes {', '.join(known[:7])}"
            )
        texts = {"checkpoint", "pretrained", "vocab_file"}  # lm_eval makes a number of a path 12
        return cls(**{name: str(v) if name in texts else v for name, v in given.items()})


@register_model("rwkvx")
class RwkvxModel(HarnessModel):
    """A checkpoint under lm_eval's own command."""

    def __init__(self, arguments: Arguments):
        path = work_path(arguments.checkpoint or arguments.pretrained)
        super().__init__(
            load_model(path, path.name, arguments),
            Answers(),
            prefill_chunk=arguments.piece,
            batch=arguments.rows,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> RwkvxModel:
        """As lm_eval makes a model of arguments by name, and of what its own flags say."""
        added = {name: v for name, v in (additional_config or {}).items() if v is not None}
        return cls(Arguments.of(arg_dict | added))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> RwkvxModel:
        """The same of a text such as "checkpoint=runs/x,top_k=3"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)
