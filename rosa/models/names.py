"""Names of modules, whatever wraps a model or the modules within it."""

# What wrappers inside a model put into names: torch.compile, activation checkpoints, FSDP1, and PEFT's tuners.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}


def plain(name: str) -> str:
    """A module's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
