"""A model by itself on disk: a finished stage of a run, or a checkpoint in published form.

RUN/stages/STAGE/model/    parameters (or adapters of the stage `base`) and, in the meta of their
                           checkpoint, the configuration
FOLDER/config.json, ...    what `rlbf import` and `rlbf export` write, and what others publish
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import is_gguf
from rlbf_jax.models import lora, transformer
from rlbf_jax.models.config import LoraConfig, ModelConfig, upgraded
from rlbf_jax.models.weights.read import read_checkpoint
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.training.checkpoint import Checkpoints


def load_model(
    folder: Path, mesh: Mesh | None = None, mend: str = "make it again"
) -> tuple[ModelConfig, dict]:
    """Model and parameters of either form; adapters are merged.

    Args:
      folder: holds `model/`, or config.json and safetensors.
      mesh: where parameters live; None: the first device.
      mend: how a damaged stage is made again, for the message.

    Raises:
      UserError: there is no model, it is damaged, or its configuration is of another version.
    """
    if not (folder / "model").is_dir():
        if is_gguf(folder) or (folder / "config.json").is_file():
            return read_checkpoint(folder, mesh)
        raise UserError(
            f"{folder}: no model here; expected a checkpoint (config.json, safetensors) as `rlbf "
            "import` writes it, "
            "or a stage of a run (RUN/stages/sft)"
        )
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    checkpoints = Checkpoints(folder / "model", mend=mend)
    meta = checkpoints.meta()
    config = config_of(meta.get("model"), folder)
    make = transformer.init_adapters if config.lora.rank else transformer.init
    params, _ = checkpoints.restore(
        jax.eval_shape(functools.partial(make, config), jax.random.key(0)), mesh
    )
    checkpoints.close()
    if not config.lora.rank:
        return config, params
    # Adapters are kept alone; the stage that they were trained on stands beside them.
    _, base = load_model(folder.parent / meta["base"], mesh)
    return lora.merge(config, lora.join(params, base))


def config_of(fields: Any, folder: Path) -> ModelConfig:
    """A configuration from JSON."""
    try:
        lists: dict[str, Any] = {"windows": tuple(fields["windows"])}
        if adapters := fields.get("lora"):
            lists["lora"] = LoraConfig(**{**adapters, "targets": tuple(adapters["targets"])})
        return ModelConfig(**{**upgraded(fields), **lists})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder}/model: its configuration cannot be read ({error}); make it again"
        ) from error
