"""Former name of `python -m data_prep.fetch_models`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("data_prep.fetch_models", run_name="__main__")
