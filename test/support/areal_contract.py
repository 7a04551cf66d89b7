"""What `integrations/areal` relies on in AReaL 1.0.4, recorded, and a package of that name which holds no more.

Fields, defaults and arguments are those of the real one (test/rl/clients/areal_adapter.py compares them).
"""

from __future__ import annotations

import json
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

RECORDED = json.loads(Path(__file__).with_name("areal_1.0.4.json").read_text(encoding="utf-8"))
MODEL = RECORDED["around_the_fields"]["tokenizer_path"]


def command(args: dict[str, Any]) -> list[str]:
    """AReaL's rule: what is empty or false is left out, what is true stands alone, lists are spread."""
    words = ["python3", "-m", RECORDED["launcher"]]
    for name, value in args.items():
        if value is None or value is False or value in ("", []):
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def build_args(sglang_config: Any, tp_size: int, base_gpu_id: int) -> dict[str, Any]:
    own = {name: value for name, value in asdict(sglang_config).items() if name != "enable_multithread_load"}
    chosen = {"tokenizer_path": sglang_config.model_path, "tp_size": tp_size, "base_gpu_id": base_gpu_id}
    return {**RECORDED["around_the_fields"], **chosen, **own}


def modules() -> dict[str, ModuleType]:
    """The pretended package, as sys.modules takes it."""
    fields = [(name, Any, field(default=default)) for name, default in RECORDED["fields"].items()]
    rules = {"build_args": staticmethod(build_args), "build_cmd_from_args": staticmethod(command)}
    config = make_dataclass("SGLangConfig", fields, namespace=rules)

    class SGLangBackend:
        def launch_server(self, server_args: dict[str, Any]) -> None:
            raise AssertionError("AReaL's own launch")

    class RemoteSGLangEngine:
        def __init__(self, config: Any) -> None:
            self.config, self._engine = config, SimpleNamespace(backend=SGLangBackend())

    grpo = make_dataclass(
        "GRPOConfig",
        [
            ("rollout", Any, field(default_factory=lambda: SimpleNamespace(_version="v1"))),
            ("actor", Any, field(default_factory=lambda: SimpleNamespace(use_lora=False))),
            ("sglang", Any, field(default_factory=config)),
        ],
        namespace={"__post_init__": lambda self: None},
    )
    contents: dict[str, dict[str, Any]] = {
        "areal": {"__path__": []},
        "areal.api": {},
        "areal.api.cli_args": {"SGLangConfig": config, "GRPOConfig": grpo, "InferenceEngineConfig": SimpleNamespace},
        "areal.engine": {},
        "areal.engine.sglang_remote": {"SGLangBackend": SGLangBackend, "RemoteSGLangEngine": RemoteSGLangEngine},
        "areal.infra": {},
        "areal.infra.utils": {},
        "areal.infra.utils.launcher": {"TRITON_CACHE_PATH": "triton_cache"},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, module in made.items():
        module.__dict__.update(contents[name])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made
