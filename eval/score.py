"""Scores the training split of one data set, on the Hub or in a folder, against its test split.

    python eval/score.py --dataset uoft-cs/cifar10 --output clean.json --protocol bridgepure

All options of `jcdp score`, which does the same for two data sets, may be added.
"""

import argparse

from jcdp_diffusers import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], add_help=False)
    parser.add_argument("--dataset", required=True, help="Hub id or folder with both splits")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--test_split", default="test")
    args, options = parser.parse_known_args()
    both = argparse.ArgumentParser(parents=[parser], conflict_handler="resolve")
    score.add_arguments(both)
    roles = ["--train", args.dataset, "--train_split", args.train_split]
    roles += ["--test", args.dataset, "--test_split", args.test_split]
    score.run(both.parse_args(["--dataset", args.dataset, *roles, *options]))


if __name__ == "__main__":
    main()
