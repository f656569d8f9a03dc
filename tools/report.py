"""Writes the table and the pictures of a recipe into its folder.

They are table.md, table.csv, pq_gflops.png (for boxes ap_gflops.png), and others.

    tools/report.py output/recipe
"""

import argparse
import sys

from eco_m2f.engine.command_line import run
from eco_m2f.report.report import write_report


def main(args: argparse.Namespace) -> None:
    table = write_report(args.folder)
    print(table.read_text())
    print(f"saved {table}; table.csv and the pictures are in the same folder")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --output folder of tools/recipe.py")
    return parser


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
