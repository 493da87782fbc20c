"""Parameters and multiply-adds (MACs) of the networks that configs describe.

  python -m commands.gflops -c configs/config_cifar100_ir100_tade.json [MORE.json ...]

Counted for one image: every convolution and linear layer with its multiply-adds (biases are free), the cosine
classifier like a linear layer (its two normalizations are free), batch norm with two operations an element. Not
counted: activations, pooling, shortcuts, layer norm, the products within attention, the mean over experts. The
published figures are made the same way but leave the cosine classifier out: "published way" is the total without it.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from model.cost import count_macs
from trainer.registry import COMPONENTS, read_config
from utils.errors import UserError
from utils.parse_config import ConfigParser, read_json


def image_size(config: ConfigParser) -> int:
    """Side of the images that the config's data loader gives, in pixels, without building it."""
    loader = COMPONENTS["data_loader"][config["data_loader"]["type"]]
    return config["data_loader"].get("args", {}).get("image_size", getattr(loader, "image_size", 224))


def cost_of(config: ConfigParser) -> pd.DataFrame:
    """`count_macs` of the network that a config describes."""
    return count_macs(config.build("arch"), image_size(config))


def format_cost(table: pd.DataFrame) -> str:
    """Millions of parameters, G multiply-adds."""
    text = pd.DataFrame({"parameters (M)": table["parameters"].map(lambda n: f"{n / 1e6:.3f}")})
    for column in table.columns[1:]:
        if table.loc["total", column]:
            text[f"{column} (G)"] = table[column].map(lambda n: f"{n / 1e9:.4f}")
    return text.to_string()


def main(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """Print the cost of each config's network.

    Returns:
        Config path -> `count_macs` table.
    """
    costs = {}
    for path in paths:
        config = read_config(read_json(path))
        costs[str(path)] = cost_of(config)
        size = image_size(config)
        print(
            f"{path}: {config['arch']['type']}, {config['arch']['args']['num_classes']} classes, "
            f"{size}x{size} pixels\n{format_cost(costs[str(path)])}\n"
        )
    if len(costs) > 1:
        print(summary(costs).to_string(index=False) + "\n")
    print(__doc__.split("\n\n")[2])
    return costs


def summary(costs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a config, as text: parameters in millions; G multiply-adds of the stem, of one expert, in total."""
    cells = {
        "stem (G)": ("stem", "MACs"),
        "an expert (G)": ("expert 1", "MACs"),
        "MACs (G)": ("total", "MACs"),
        "published way (G)": ("total", "published way"),
    }
    rows = []
    for path, table in costs.items():
        row = {"config": Path(path).stem.removeprefix("config_")}
        row |= {"parameters (M)": f"{table.loc['total', 'parameters'] / 1e6:.2f}", "experts": len(table) - 2}
        rows.append(row | {name: f"{table.loc[cell] / 1e9:.4f}" for name, cell in cells.items()})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, nargs="+", required=True, metavar="JSON", help="config files")
    try:
        main(parser.parse_args().config)
    except UserError as error:
        sys.exit(str(error))
