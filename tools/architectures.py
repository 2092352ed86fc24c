"Try compression on networks that were not written for it: python tools/architectures.py writes nbs/tutorials/architectures.csv"
import argparse, csv, subprocess, sys, time
from pathlib import Path

networks = {'torchvision': dict(resnet18=64, resnet50=64, resnext50_32x4d=64, mobilenet_v2=64, mobilenet_v3_small=64, densenet121=64, efficientnet_b0=64, convnext_tiny=64,
                                vit_b_16=224, swin_t=64, regnet_y_400mf=64, shufflenet_v2_x1_0=64, vgg11_bn=64, squeezenet1_1=64, googlenet=64, inception_v3=128, mnasnet1_0=64, alexnet=96),
            'timm': dict(resnet18=64, resnet26d=64, seresnet18=64, mobilenetv3_small_100=64, efficientnet_lite0=64, ghostnet_100=64, convnext_atto=64, vit_tiny_patch16_224=224, mixer_s32_224=224, repvgg_a0=64)}

def make(library, name):
    if library=='timm':
        import timm
        return timm.create_model(name, num_classes=10)
    import torchvision
    return torchvision.models.get_model(name, weights=None, num_classes=10, **(dict(aux_logits=False, init_weights=False) if name in ('googlenet', 'inception_v3') else {}))

def attempt(library, name, size, what):
    import torch
    from adverfine.cost import macs
    from adverfine.deployment import integer_network
    from adverfine.pruning import prune
    from adverfine.quantization import quantize
    torch.manual_seed(0)
    net,x = make(library, name),torch.rand(2, 3, size, size)
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.02)              # heads and scales that begin at zero would hide everything
    with torch.no_grad(): net(torch.rand(4, 3, size, size))            # BatchNorm sees some images
    net.eval()
    before,said = macs(net, x),[]
    if 'prune' in what:
        prune(net, .5, x)
        said.append(f'{macs(net, x)/before:.2f} of the MACs left')
    if 'quantize' in what:
        quantize(net, 8, [x])
        with torch.autocast('cpu', torch.bfloat16): out = net(x)
        if not out.isfinite().all(): raise FloatingPointError('not finite in bfloat16')
        off = (integer_network(net)(x)-net(x)).norm()/net(x).norm()
        said.append(f'integers off by {off:.0e}')
    net.train()
    net(torch.cat([x, x])).sum().backward()
    if any(not p.grad.isfinite().all() for p in net.parameters() if p.grad is not None): raise FloatingPointError('a gradient is not finite')
    return 'yes: ' + ', '.join(said)

columns = dict(int8=('quantize',), pruned_by_half=('prune',), both=('prune', 'quantize'))

def attempts(library, name, size):
    "Each column in turn, a line for each"
    for what in columns.values():
        try: said = attempt(library, name, size, what)
        except Exception as e: said = f"no: {type(e).__name__}: {' '.join(str(e).split())[:150]}"
        sys.stdout.write(f'@{said}\n'); sys.stdout.flush()

def tried(library, name, size, timeout=60):
    "A process for each network, since some never end"
    call = f'import sys, warnings; warnings.simplefilter("ignore"); sys.path.insert(0, {str(Path(__file__).parent)!r}); import architectures; architectures.attempts({library!r}, {name!r}, {size})'
    try: out = subprocess.run([sys.executable, '-c', call], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout).stdout
    except subprocess.TimeoutExpired as e: out = e.stdout or b''
    said = [o[1:] for o in out.decode().splitlines() if o.startswith('@')]
    return dict(zip(columns, said + [f'no: not done after {timeout} s']*3))

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default=Path(__file__).parents[1]/'nbs'/'tutorials'/'architectures.csv')
    out = Path(parser.parse_args().out)
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    done = {(r['library'], r['network']) for r in rows}
    for library,names in networks.items():
        for name,size in names.items():
            if (library, name) in done: continue
            start = time.perf_counter()
            rows.append(dict(library=library, network=name, image=size, **tried(library, name, size)))
            rows.sort(key=lambda r: (list(networks).index(r['library']), list(networks[r['library']]).index(r['network'])))
            with out.open('w', newline='') as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader(); writer.writerows(rows)
            sys.stderr.write(f'{library} {name}: {time.perf_counter()-start:.0f} s\n')
