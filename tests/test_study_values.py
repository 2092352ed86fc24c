"Studies of values: joint compression, networks and images of one's own, the reference's judge"
import json
from functools import partial
import pytest, torch
import adverfine.study.presets  # noqa: F401 makes studies
from safetensors.torch import load_file
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import NFGSM, PGD
from adverfine.study.protocol import Compression, FineTune, Judge
from adverfine.study.folder import read_study
from adverfine.study.study import Study
from adverfine.study.tables import title_of

def small_network(): return cnn8(size=8)

def test_a_folder_of_an_older_version_is_refused(tmp_path):
    "Before there were values, a study was written down as names and numbers"
    (tmp_path/'study.json').write_text(json.dumps(dict(study=dict(data='digits', epochs=15), version='0.0.9')))
    with pytest.raises(ValueError, match='of a version of adverfine before'):
        Study('digits', 'cnn8', (), FineTune('none'), FineTune('standard'), Judge(PGD(.1)), out=tmp_path).run()

def test_a_joint_study_with_a_network_of_ones_own(tmp_path):
    tunings = [FineTune('none'), FineTune('adversarial', 1, attack=NFGSM(.1), average=.9, watched=True, name='fast')]
    judge = Judge(PGD(.1, steps=3), 40, escalate=False, sweep=PGD(.1, steps=2))
    study = Study(partial(digits_dls, bs=64, n_train=300, n_test=60), small_network, [Compression(.5, (4, 8))], tunings,
                  FineTune('standard', 2, 5e-3), judge, seeds=(0, 1), out=tmp_path, bf16=False)
    df = study.run(progress=False)
    assert len(df)==2*2*2 and set(df.label)=={'none-0', 'prune-0.5-quantize-4-8'} and set(df.data)=={'digits_dls'}
    joint = df[(df.label!='none-0') & (df.fine_tuning=='fast')]
    assert (joint.prune==.5).all() and (joint.weight_bits==4).all() and (joint.input_bits==8).all()
    assert (joint.n==40).all() and (joint.sweep_n==60).all() and joint.robust_seeds.notna().all()
    assert (joint.macs<df.macs.max()/3).all() and (joint.bytes<df.bytes.max()/8).all()
    assert joint.train_attack.str.startswith('NFGSM(eps=0.1').all() and (joint.training_seconds>0).all()
    protocol = json.loads((tmp_path/'study.json').read_text())['protocol']
    assert protocol['network']=={'kind': f'{__name__}:small_network'} and protocol['fine_tunings']['fast']['watched']
    again = Study(partial(digits_dls, bs=64, n_train=300, n_test=60), small_network, [Compression(.5, (4, 8))],
                  FineTune('standard', 2, name='fast'), FineTune('standard', 2, 5e-3), judge, out=tmp_path, bf16=False)
    with pytest.raises(ValueError, match="fast.how is 'adversarial' there and 'standard' here"): again.run()

def test_the_sweep_judges_as_the_reference_does(tmp_path):
    attack = PGD(.1, steps=3, step_size=.02, random_start=False, clamp=False)
    judge = Judge(attack, 30, escalate=False, sweep=attack, by_sweep=True)
    study = Study('digits', 'cnn8', Compression(.5), FineTune('none'), FineTune('standard', 2, 5e-3), judge,
                  out=tmp_path, bf16=False, n_train=300, n_test=60)
    row = study.run(progress=False).iloc[0]
    net = cnn8(size=8).eval()
    net.load_state_dict(load_file(next((tmp_path/'parents').iterdir())))
    x,y = pixels(digits_dls(n_train=300, n_test=60).test)
    def right(x): return net(x*2-1).argmax(1)==y
    x_adv = x.clone()
    for _ in range(3):
        z = x_adv.clone().requires_grad_()
        g, = torch.autograd.grad(torch.nn.functional.cross_entropy(net(z*2-1), y, reduction='sum'), z)
        x_adv = x + (x_adv+.02*g.sign()-x).clamp(-.1, .1)
    with torch.no_grad(): clean,robust = right(x),right(x)&right(x_adv)
    assert (row.clean, row.n)==(pytest.approx(clean.float().mean().item()), 60)
    assert row.robust==pytest.approx(robust.float().mean().item()) and row.robust==row.sweep_robust
    assert row.judged_n==30 and not row.clamp

def test_images_are_called_as_one_likes(tmp_path):
    few = dict(levels=(), bits=(8,), fine_tunings='none', epochs=1, n_train=200, n_test=40, escalate=False)
    study = Study.quick('digits', out=tmp_path/'a', called='digits, 8 by 8', **few)
    df = study.run(progress=False)
    assert set(df.data)=={'digits, 8 by 8'} and title_of(df).startswith('digits, 8 by 8: ')
    assert read_study(study.out).protocol['data']['name']=='digits, 8 by 8'
    other = Study.quick('digits', out=study.out, **few)
    with pytest.raises(ValueError, match='digits, 8 by 8'): other.run(progress=False)
    assert Study.quick('digits', called='odd/name').out.as_posix()=='studies/digits'
