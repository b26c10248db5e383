from builders.fixtures import aux, out, tiny  # noqa: F401
