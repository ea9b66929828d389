__version__ = "0.1.0"

# What `from anomdx import …` offers, loaded on first use: `import anomdx` itself stays light.
_HOME = dict(load_scan="loaders", save_map="loaders", save_mask="loaders", find_series="series", load_oct="oct", open_slide="slides", load_config="experiment", create_model="zoo", create_trainer="experiment",
             run="experiment", open_run="runs", evaluate="runs", predict="runs", progressive="runs", open_archive="streaming", open_nih="kaggle", nih_table="kaggle")
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'anomdx' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"anomdx.{_HOME[name]}"), name)


def __dir__(): return sorted([*globals(), *_HOME])
