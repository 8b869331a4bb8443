def load_plugin(name: str) -> None:
    raise NotImplementedError
