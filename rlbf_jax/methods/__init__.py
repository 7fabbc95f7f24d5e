"""Papers: one file each, and one line in the list below.

`METHODS` holds the configuration of every method by its name. Its file reads like the paper's
method section; `shared` has the stages that several papers have.
"""

from rlbf_jax.methods.bsafe import BsafeConfig
from rlbf_jax.methods.reset import ResetConfig
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.runs.experiment import MethodConfig

PAPERS: tuple[type[MethodConfig], ...] = (RlbfConfig, ResetConfig, BsafeConfig)
"""The one list to which a new paper's file is added."""
METHODS = {paper.name: paper for paper in PAPERS}
