"""Scores the training split of one data set, on the Hub or in a folder, against its test split.

    python eval/score.py --dataset uoft-cs/cifar10 --output clean.json --protocol bridgepure

All options of `jcdp score`, which does the same for two data sets, may be added.
"""

from jcdp_diffusers import score
from jcdp_diffusers.cli import Parser, ends_in_one_sentence


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0], add_help=False)
    parser.add_argument(
        "--dataset", help="stands for --train and --test, with splits train and test if none are given"
    )
    args, options = parser.parse_known_args()
    if args.dataset is not None:
        roles = ["--train", args.dataset, "--train_split", "train", "--test", args.dataset, "--test_split", "test"]
        options = roles + options
    both = Parser(description=parser.description, parents=[parser])
    score.add_arguments(both)
    args = both.parse_args(options)
    with ends_in_one_sentence("score"):
        score.run(args)


if __name__ == "__main__":
    main()
