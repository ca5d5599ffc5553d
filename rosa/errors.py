"""Errors that name what came and what was expected."""


class UnsupportedModelError(ValueError):
    """The model cannot be adapted; the message names its class and the reason. Nothing was changed."""


class AdapterError(ValueError):
    """An adapter on disk is missing, damaged, of an unknown format, or made for another base model."""
