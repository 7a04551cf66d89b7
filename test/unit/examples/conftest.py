"""SGLang's own argument parser, without a server."""

from __future__ import annotations

import argparse

import pytest


@pytest.fixture(scope="session")
def sglang_parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    return parser
