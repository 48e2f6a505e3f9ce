"""Models scored on the same tasks in one run: what `srd compare` does.

`candidate` says what is scored and opens it, `store` keeps every finished score so that a run can go on where it
stopped, `run` does the whole, `environment` says where it was measured.
"""
