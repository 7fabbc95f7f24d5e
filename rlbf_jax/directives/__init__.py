"""Edit rules: which emitted ids a reader sees, and which ids later queries may still attend to.

Everything that samples, scores, trains or evaluates shares the rule objects of this room.
Start with `rule`; then `backtrack` (RLBF), `reset` (RESET) and `replace` (BSAFE)
are one screen each; `layout` gives lifetimes, `render` is the output handler,
`controls` says where the ids of a vocabulary stand.
"""

from rlbf_jax.directives.backtrack import BacktrackRule
from rlbf_jax.directives.controls import DEFAULT_KINDS, Controls
from rlbf_jax.directives.layout import Layout, layout
from rlbf_jax.directives.render import Edit, IdKind, Rendered, render
from rlbf_jax.directives.replace import ReplaceRule
from rlbf_jax.directives.reset import ResetRule
from rlbf_jax.directives.rule import (
    CATEGORY,
    CONTENT,
    NEVER,
    RETRACTION,
    EditRule,
    EditState,
    Legal,
    Limits,
    Semantics,
)

__all__ = [
    "CATEGORY",
    "CONTENT",
    "DEFAULT_KINDS",
    "NEVER",
    "RETRACTION",
    "BacktrackRule",
    "Controls",
    "Edit",
    "EditRule",
    "EditState",
    "IdKind",
    "Layout",
    "Legal",
    "Limits",
    "Rendered",
    "ReplaceRule",
    "ResetRule",
    "Semantics",
    "layout",
    "render",
]
