from builders.fixtures import out, tiny  # noqa: F401
