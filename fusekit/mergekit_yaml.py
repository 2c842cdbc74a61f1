"""`python -m fusekit.mergekit_yaml CONFIG OUT`: mergekit-yaml with fusekit's merge methods, without the autoload."""

import fusekit.merge_methods  # noqa: F401 - registers the methods


def main() -> None:
    """Run mergekit's own mergekit-yaml command."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    mergekit_yaml()


if __name__ == "__main__":
    main()
