"""``python -m agents`` is the command ``dpok``."""

from agents.cli.main import run_process

if __name__ == "__main__":
    run_process()
