"""U-Net: a contracting and an expanding path with a skip connection at every level, trained from scratch.

    python train_5_c.py

Writes best_train_5_c.pt, last_train_5_c.pt, plots/train_5_c_*.png and results/train_5_c_seed*.csv and .json.
Mean IoU on CamVid: val 0.6098 ± 0.0051, test 0.4850 ± 0.0063 (3 seeds, 100 epochs, CPU, PyTorch 2.14; REPORT.md).
"""

import torch

import util
import voc
from seg import cli, engine, transforms
from unet import UNet


def main():
    args = cli.arguments(__file__, __doc__, epochs=100, batch_size=8)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(flip=0.5, scale=(0.7, 1.1), brightness=0.3, contrast=0.3, saturation=0.3)
    train, val, test = voc.loaders(args, size=224, augment=augment)

    model = UNet(len(train.classes), width=16).to(args.device)

    weight = voc.class_weights(train.split).sqrt().to(args.device)
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler)


if __name__ == "__main__":
    cli.run(main)
