"""What each command of `cammask` does; `cli.py` holds their options and turns errors into lines."""
