"""`rlbf generate`: answers of a run's stage, or of a checkpoint, with what was taken back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError

Folder = tyro.conf.Positional[Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")]]
Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample from a stage of a run, or from a checkpoint. On a terminal erased words are \
shown struck through."""

    folder: Folder
    """Folder of a run, of one of its stages, or of a checkpoint."""
    stage: str = ""
    """A stage of the run, as base or sft; default: its last one."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask; may be given several times.
    Without it, prompts are read from standard input, one a line."""
    forced: str = ""
    """Words put into the model's mouth before it goes on (prefilling); it may take them back."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the k most likely ids only; 0: from all."""
    top_p: float = 1.0
    """Draw from the smallest set of ids with this much probability."""
    max_tokens: int = 64
    """Most ids emitted, forced words and directives included."""
    budget: int = 4
    """Most directives of an answer; a run is evaluated with its evaluation.knobs.budget."""
    control_bias: dict[str, float] = dataclasses.field(default_factory=dict)
    """Added to logits of control ids, as `--control_bias categories 2.0`: of a token, a category,
    `categories` (what begins a directive) or `retractions`."""
    n: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """Same seed, same answers."""
    forbid_directives: Flag = False
    """The model may not take anything back."""
    json: Flag = False
    """One JSON object a line: prompt, visible text, trace, edits."""


def generate(argv: Sequence[str]) -> None:
    """`rlbf generate FOLDER`."""
    args: Generate = arguments.parse(Generate, "rlbf generate", argv)
    prompts = list(args.prompt)
    if not prompts and not sys.stdin.isatty():
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError(
            "there is no prompt: give --prompt TEXT, or prompts on standard input, one a line"
        )
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty, expected some text")
    if args.n < 1 or args.max_tokens < 1:
        raise UserError(
            f"--n is {args.n} and --max_tokens {args.max_tokens}, both expected to be at least 1"
        )
    if args.budget < 0:
        raise UserError(f"--budget is {args.budget}, expected 0 or more")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}, expected 0..{2**63 - 1}")
    from rlbf_jax.runs import load
    from rlbf_jax.sampling.request import Knobs, Request

    policy = load.load(args.folder, args.stage)
    knobs = Knobs(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        budget=args.budget,
        control_bias=args.control_bias,
    )
    knobs = knobs.without_directives() if args.forbid_directives else knobs
    forced = tuple(policy.tokenizer.encode(args.forced))
    requests = [Request(prompt, forced, knobs) for prompt in prompts for _ in range(args.n)]
    show(policy.sample(requests, args.seed), policy, args.json)


def show(generations: Sequence, policy, as_json: bool) -> None:
    """Prints answers: as JSON, on a terminal with what was taken back, or as plain text."""
    from rlbf_jax.report import traces

    if as_json:
        for generation in generations:
            row = traces.row_of(generation, policy.tokenizer, policy.rule)
            print(json.dumps(row, ensure_ascii=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        for generation in generations:
            row = traces.row_of(generation, policy.tokenizer, policy.rule)
            prompt = traces.printable(generation.request.prompt)
            console.print(f"> {prompt}", style="dim", markup=False)
            console.print(traces.render_trace_terminal(row), "", sep="\n")
    else:
        for generation in generations:
            print(generation.text)
