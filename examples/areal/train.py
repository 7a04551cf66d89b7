"""GRPO with AReaL and servers of sglang-er: python train.py --config grpo.yaml scheduler.type=local

Three lines make it ours: the import, the config class and `use_in_trainer`. Any script for AReaL's trainer takes them.
"""

from __future__ import annotations

import sys

from areal import PPOTrainer
from areal.api.cli_args import load_expr_config
from areal.dataset import get_custom_dataset
from areal.utils.hf_utils import load_hf_tokenizer

from sglang_er.integrations.areal import ERGRPOConfig, use_in_trainer


def main(argv: list[str]) -> None:
    use_in_trainer()
    config, _ = load_expr_config(argv, ERGRPOConfig)
    tokenizer = load_hf_tokenizer(config.tokenizer_path)
    prompts = get_custom_dataset(split="train", dataset_config=config.train_dataset, tokenizer=tokenizer)
    with PPOTrainer(config, train_dataset=prompts) as trainer:
        trainer.train(
            workflow="areal.workflow.rlvr.RLVRWorkflow",
            workflow_kwargs={
                "reward_fn": "areal.reward.gsm8k.gsm8k_reward_fn",
                "gconfig": config.gconfig,
                "tokenizer": config.tokenizer_path,
            },
        )


if __name__ == "__main__":
    main(sys.argv[1:])
