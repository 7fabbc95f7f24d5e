"""The peers of `rl_step.py` in a process of their own: TRL's `GRPOTrainer` or tunix's
`GRPOLearner`.

rl_step_peer.py {trl|tunix} FOLDER THREADS PROMPTS GROUP PROMPT NEW

FOLDER holds a Llama-type model. Each line on stdin asks for one step of the same training, and is
answered by one:

    {"seconds": s, "sampling": s, "rows": n, "ids": n}

{"memory": MB} is the answer to a line "memory": the most that the process held.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np


class Watch:
    """Steps that are asked for on stdin, and told on stdout."""

    def __init__(self, name: str, prompts: int, length: int):
        self.sampling = self.rows = self.ids = 0
        self.began: float | None = None
        self.random = np.random.default_rng(0)
        self.shape = prompts, length
        print(json.dumps({"ready": name}), flush=True)

    def prompts(self) -> list[list[int]]:
        return self.random.integers(2, 1000, self.shape).tolist()

    def over(self) -> None:
        """A step has ended (or none has begun): tell it, wait to be asked for the next."""
        if self.began is not None:
            told = {"seconds": time.perf_counter() - self.began, "sampling": self.sampling}
            print(json.dumps(told | {"rows": self.rows, "ids": self.ids}), flush=True)
        while (line := sys.stdin.readline().strip()) == "memory":
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(json.dumps({"memory": held}), flush=True)
        if not line:
            sys.exit()
        self.began, self.sampling = time.perf_counter(), 0.0

    def sampled(self, generate):
        """`generate`, its seconds counted as sampling."""

        def counted(*args, **named):
            began = time.perf_counter()
            found = generate(*args, **named)
            self.sampling += time.perf_counter() - began
            return found

        return counted

    def reward(self, answers: list[list[int]]) -> list[float]:
        """Share of even ids: the reward of all three."""
        self.rows, self.ids = len(answers), sum(map(len, answers))
        return [float(np.mean(np.asarray(ids) % 2 == 0)) for ids in answers]


def trl(folder: str, threads: int, prompts: int, group: int, length: int, new: int) -> None:
    import tempfile

    import datasets
    import tokenizers
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    size = model.config.vocab_size
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token=str(size - 1)
    )
    watch = Watch("trl", prompts, length)
    rows = [
        {"prompt": " ".join(map(str, ids))}
        for _ in range(1000 // prompts)
        for ids in watch.prompts()
    ]

    def reward(completion_ids, **_):
        return watch.reward(completion_ids)

    class Asked(transformers.TrainerCallback):
        def on_step_end(self, *args, **named):
            watch.over()

    trainer = GRPOTrainer(
        model,
        reward,
        GRPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=prompts * group,
            num_generations=group,
            max_completion_length=new,
            max_steps=10_000,
            beta=0.0,
            loss_type="grpo",
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Asked()],
    )
    trainer._generate_single_turn = watch.sampled(trainer._generate_single_turn)
    watch.over()
    trainer.train()


def tunix(folder: str, threads: int, prompts: int, group: int, length: int, new: int) -> None:
    import jax
    import optax
    from flax import nnx
    from sampler_peer import Ids, tunix_model
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout import base_rollout

    model, mesh, c = tunix_model(folder)
    watch = Watch("tunix", prompts, length)

    def reward(prompts, completions, **_):
        return watch.reward([json.loads(text) for text in completions])

    role = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Ids(c["vocab_size"]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.ROLLOUT, role.REFERENCE), mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-5), max_steps=10_000, eval_every_n_steps=10_000
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=new,
                max_prompt_length=length,
                kv_cache_size=length + new,
                temperature=1.0,
                eos_tokens=[c["vocab_size"] - 1],
            ),
        ),
    )
    cluster.rollout.generate = watch.sampled(cluster.rollout.generate)
    learner = GRPOLearner(
        cluster, GRPOConfig(num_generations=group, num_iterations=1, beta=0.0), reward
    )

    def asked() -> Iterator[dict]:
        while True:
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            watch.over()
            yield {"prompts": np.asarray([json.dumps(ids) for ids in watch.prompts()])}

    learner.train(asked())


if __name__ == "__main__":
    name, folder, *sizes = sys.argv[1:]
    {"trl": trl, "tunix": tunix}[name](folder, *map(int, sizes))
