"""`python -m bagel_mot` is `bagel-mot`."""

from bagel_mot.cli import main

if __name__ == "__main__":
    main()
