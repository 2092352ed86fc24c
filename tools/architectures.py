"Try compression on networks that were not written for it; `python tools/architectures.py` writes its table"
import argparse, csv, subprocess, sys, time
from pathlib import Path

networks = {  # library -> name of a network -> size of its images
    'torchvision': dict(
        resnet18=64, resnet50=64, resnext50_32x4d=64, mobilenet_v2=64, mobilenet_v3_small=64, densenet121=64,
        efficientnet_b0=64, convnext_tiny=64, vit_b_16=224, swin_t=64, regnet_y_400mf=64, shufflenet_v2_x1_0=64,
        vgg11_bn=64, squeezenet1_1=64, googlenet=64, inception_v3=128, mnasnet1_0=64, alexnet=96),
    'timm': dict(
        resnet18=64, resnet26d=64, seresnet18=64, mobilenetv3_small_100=64, efficientnet_lite0=64, ghostnet_100=64,
        convnext_atto=64, vit_tiny_patch16_224=224, mixer_s32_224=224, repvgg_a0=64)}

def make(library, name):
    "A network with random weights and ten classes"
    if library=='timm':
        import timm
        return timm.create_model(name, num_classes=10)
    import torchvision
    kwargs = dict(aux_logits=False, init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **kwargs)

def prepared(library, name, size):
    "A network that has seen some images, in eval mode"
    import torch
    torch.manual_seed(0)
    net = make(library, name)
    x = torch.rand(2, 3, size, size)
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.02)  # heads and scales that begin at zero would hide all
    with torch.no_grad(): net(torch.rand(4, 3, size, size))  # BatchNorm sees some images
    return net.eval(),x

def check_gradients(net, x):
    "Train for a step"
    import torch
    net.train()
    net(torch.cat([x, x])).sum().backward()
    if any(not p.grad.isfinite().all() for p in net.parameters() if p.grad is not None):
        raise FloatingPointError('a gradient is not finite')

def attempt(library, name, size, what):
    "Do to a network `what` a column says, try it out, and say how it went"
    import torch
    from adverfine.compression.pruning import prune
    from adverfine.compression.quantization import quantize
    from adverfine.deployment.integer import integer_network
    from adverfine.networks.cost import macs
    net,x = prepared(library, name, size)
    before = macs(net, x)
    said = []
    if 'prune' in what:
        prune(net, .5, x)
        said.append(f'{macs(net, x)/before:.2f} of the MACs left')
    if 'quantize' in what:
        quantize(net, 8, [x])
        with torch.autocast('cpu', torch.bfloat16): out = net(x)
        if not out.isfinite().all(): raise FloatingPointError('not finite in bfloat16')
        off = (integer_network(net)(x)-net(x)).norm()/net(x).norm()
        said.append(f'integers off by {off:.0e}')
    check_gradients(net, x)
    return 'yes: ' + ', '.join(said)

columns = dict(int8=('quantize',), pruned_by_half=('prune',), both=('prune', 'quantize'))

def attempts(library, name, size):
    "Each column in turn, a line for each"
    for what in columns.values():
        try: said = attempt(library, name, size, what)
        except Exception as e: said = f"no: {type(e).__name__}: {' '.join(str(e).split())}"
        sys.stdout.write(f'@{said}\n')
        sys.stdout.flush()

def tried(library, name, size, timeout=60):
    "A process for each network, since some never end"
    call = ('import sys, warnings; warnings.simplefilter("ignore"); '
            f'sys.path.insert(0, {str(Path(__file__).parent)!r}); '
            f'import architectures; architectures.attempts({library!r}, {name!r}, {size})')
    process = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout)
    try:
        ended = subprocess.run([sys.executable, '-c', call], **process)
        out,why = ended.stdout,f'no: its process ended with {ended.returncode}'
    except subprocess.TimeoutExpired as e: out,why = e.stdout or b'',f'no: not done after {timeout} s'
    said = [o[1:] for o in out.decode().splitlines() if o.startswith('@')]
    return dict(zip(columns, said + [why]*3))

def write_table(out):
    "Try what `out` has no row for; each row is written as soon as it is there"
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    done = {(r['library'], r['network']) for r in rows}
    order = [(library, name) for library,names in networks.items() for name in names]
    for library,name in order:
        if (library, name) in done: continue
        start = time.perf_counter()
        size = networks[library][name]
        rows.append(dict(library=library, network=name, image=size, **tried(library, name, size)))
        rows.sort(key=lambda r: order.index((r['library'], r['network'])))
        with out.open('w', newline='') as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        sys.stderr.write(f'{library} {name}: {time.perf_counter()-start:.0f} s\n')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1]/'nbs'/'tutorials'/'architectures.csv'
    parser.add_argument('--out', type=Path, default=default)
    write_table(parser.parse_args().out)
