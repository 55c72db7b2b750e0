"""s2a: fine-tune pretrained vision backbones in little memory."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`s2a_cli.predict_memory`, imported when it is first used: torch takes seconds."""
    if name == "predict_memory":
        from s2a_cli.planner.api import predict_memory

        return predict_memory
    raise AttributeError(f"module 's2a_cli' has no attribute {name!r}")
