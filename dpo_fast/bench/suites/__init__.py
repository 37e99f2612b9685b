"""The suites: each module has ``cases(settings)``; the first line of its docstring names it."""
