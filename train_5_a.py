"""Custom network: a residual encoder and a decoder with skip connections, lighter than the baseline.

    python train_5_a.py

Writes best_train_5_a.pt, last_train_5_a.pt, plots/train_5_a_*.png and results/train_5_a_seed*.csv and .json.
Mean IoU on CamVid: val 0.6112 ± 0.0126, test 0.4857 ± 0.0075 (3 seeds, 48 epochs, CPU, PyTorch 2.14; REPORT.md).
"""

import torch

import util
import voc
from custom_fcn import CustomFCN
from seg import cli, engine, transforms


def main():
    args = cli.arguments(__file__, __doc__, epochs=48, batch_size=4)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(flip=0.5, scale=(0.7, 1.1), brightness=0.3, contrast=0.3, saturation=0.3)
    train, val, test = voc.loaders(args, size=224, augment=augment)

    model = CustomFCN(len(train.classes)).to(args.device)

    weight = voc.class_weights(train.split).sqrt().to(args.device)
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-2, fused=True)

    # The learning rate rises to max_lr in the first epochs, then falls to 0.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=args.epochs * len(train), pct_start=0.15, cycle_momentum=False
    )

    engine.fit(
        args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler,
        scheduler_interval="batch",
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
