"""`python -m mot_bench` is the command `mot-bench`."""

from mot_bench.cli import main

main()
