import functools

import typer.main

# Typer reads the signatures of all commands at each call, which takes longer than most commands do.
typer.main.get_params_from_function = functools.cache(typer.main.get_params_from_function)
