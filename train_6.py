"""All ideas together: a fine-tuned ResNet-18 in a U-Net, a larger input, and averaged weights.

    python train_6.py

The ImageNet weights (45 MB) are downloaded once; --no-pretrained starts from random ones. Val is evaluated with the
averaged weights, which lag behind in the first few hundred steps.
Writes best_train_6.pt, last_train_6.pt, plots/train_6_*.png and results/train_6_seed*.csv and .json.
Mean IoU on CamVid: val 0.7040 ± 0.0057, test 0.6245 ± 0.0027 (3 seeds, 40 epochs, CPU, PyTorch 2.14; REPORT.md)
with a substitute for torchvision's ResNet-18 weights (REPORT.md, Limitations).
"""

import torch
from torchvision.models import ResNet18_Weights

import util
import voc
from resnet_unet import AveragedResNetUNet
from seg import checkpoint, cli, engine, transforms


def main():
    args = cli.arguments(__file__, __doc__, epochs=40, batch_size=8, pretrained=True)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(flip=0.5, scale=(0.7, 1.1), brightness=0.3, contrast=0.3, saturation=0.3)
    size = (352, 480)  # landscape photos nearly keep their shape, and thin objects are wider than at 224
    train, val, test = voc.loaders(args, size=size, augment=augment)

    weights = ResNet18_Weights.IMAGENET1K_V1 if args.pretrained else None
    checkpoint.download(weights)
    model = AveragedResNetUNet(len(train.classes), weights, decay=0.99).to(args.device)

    weight = voc.class_weights(train.split).sqrt().to(args.device)
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    # The backbone has learned from a million photos, and is to forget little of it; its batch norm is trained too.
    backbone = {"params": model.network.backbone.parameters(), "lr": 2e-4}
    decoder = {"params": [*model.network.decoder.parameters(), *model.network.classifier.parameters()], "lr": 1e-3}
    optimizer = torch.optim.AdamW([backbone, decoder], weight_decay=1e-2, fused=True)
    optimizer.register_step_post_hook(model.update)

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler)


if __name__ == "__main__":
    cli.run(main)
