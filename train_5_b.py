"""Transfer learning: a frozen ResNet-18, trained on ImageNet, with a decoder of transposed convolutions.

    python train_5_b.py

The ImageNet weights (45 MB) are downloaded once; --no-pretrained starts from random ones.
Writes best_train_5_b.pt, last_train_5_b.pt, plots/train_5_b_*.png and results/train_5_b_seed*.csv and .json.
Mean IoU on CamVid: val 0.5034 ± 0.0034, test 0.4130 ± 0.0018 (3 seeds, 40 epochs, CPU, PyTorch 2.14; REPORT.md)
with a substitute for torchvision's ResNet-18 weights (REPORT.md, Limitations).
"""

import torch
from torchvision.models import ResNet18_Weights

import util
import voc
from resnet_fcn import ResNetFCN
from seg import checkpoint, cli, engine, transforms


def main():
    args = cli.arguments(__file__, __doc__, epochs=40, batch_size=16, pretrained=True)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(flip=0.5, scale=(0.7, 1.1), brightness=0.3, contrast=0.3, saturation=0.3)
    # at 224, the backbone's features would be a grid of only 7x7
    train, val, test = voc.loaders(args, size=320, augment=augment)

    weights = ResNet18_Weights.IMAGENET1K_V1 if args.pretrained else None
    checkpoint.download(weights)
    model = ResNetFCN(len(train.classes), weights).to(args.device)

    weight = voc.class_weights(train.split).sqrt().to(args.device)
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler)


if __name__ == "__main__":
    cli.run(main)
