"Evaluations from the command line: how far they go, where they stop and go on, and what a model card says of them"
import json
import pytest, torch
from torch import nn
from fastai.learner import Learner
from adverfine.cli import main
from adverfine.networks.zoo import cnn8
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.deployment.card import card
from adverfine.deployment.checkpoint import compressed_info
from adverfine.training.recipes import compress
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A network of the digits in a folder, and one of the same kind that was never trained"
    folder = tmp_path_factory.mktemp('nets')
    torch.manual_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8), loss_func=nn.CrossEntropyLoss())
    learn.save_compressed(folder/'raw')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3)
    learn.save_compressed(folder/'net')
    return folder

def _evaluated(saved, capsys, options):
    assert main(['evaluate', f'{saved}/net', '--data', 'digits', '--json', *options.split()])==0
    return json.loads(capsys.readouterr().out)

def test_evaluate_goes_on_unless_told_not_to(saved, capsys):
    some = '--attack fgsm --eps 0.1 --n 40'
    short,whole = (_evaluated(saved, capsys, f'{some} {o}') for o in ('--no-escalate', ''))
    assert (short['escalated'], whole['escalated'], whole['data'], whole['split'])==(False, True, 'digits', 'test')
    assert whole['robust']<=short['left']['FGSM'] and sum(whole['passes'].values())>sum(short['passes'].values())
    assert whole['robust_ci'][0]<=whole['robust']<=whole['robust_ci'][1]
    assert _evaluated(saved, capsys, f'{some} --budget 3000')['robust']==whole['robust']
    assert main(['evaluate', f'{saved}/net', '--data', 'digits', '--eps', '0.1', '--budget', '9'])==2
    assert 'budget=9' in capsys.readouterr().err

@pytest.mark.parametrize('options,names', [
    ('--attack fmn --norm l2 --eps 0.5', ['FMN']), ('--attack fmn pgd --eps 0.05', ['PGD-20', 'FMN']),
    ('--attack pgd square --norm l1 --eps 1', ['PGD-20', 'Square']), ('--attack pgd --norm l0 --eps 2', ['PGD-20']),
    ('--attack adaptive --eps 0.05', ['AutoAttack-adaptive'])])
def test_attacks_and_norms_by_name(saved, capsys, options, names):
    said = _evaluated(saved, capsys, f'{options} --n 10 --no-escalate')
    assert [o['name'] for o in said['attacks']]==names
    assert said['threat']['norm']==(options.split('--norm ')[1].split()[0] if '--norm' in options else 'linf')

def test_attacks_that_do_not_work_in_a_norm_say_so(saved, capsys):
    for options in ('--norm l1 --eps 1', '--norm l0 --eps 2 --attack fmn', '--attack foo --eps 0.1'):
        assert main(['evaluate', f'{saved}/net', '--data', 'digits', *options.split()])==2
        assert 'use ' in capsys.readouterr().err

def test_evaluate_goes_on_from_its_folder(saved, capsys, tmp_path):
    some = f'--attack pgd --eps 0.1 --n 40 --no-escalate --state {tmp_path}/state'
    first = _evaluated(saved, capsys, some)
    assert list((tmp_path/'state').iterdir())
    again = _evaluated(saved, capsys, some)
    assert (again['outcomes'], again['passes'], again['took'])==(first['outcomes'], first['passes'], first['took'])
    assert main(['evaluate', f'{saved}/net', '--data', 'digits', *some.replace('--n 40', '--n 30').split()])==2
    assert 'holds another evaluation' in capsys.readouterr().err

def test_evaluate_makes_images_on_the_parent(saved, capsys):
    some = '--attack pgd --eps 0.1 --n 40 --no-escalate'
    guards = [{o['guard'] for o in _evaluated(saved, capsys, f'{some} {o}')['findings']}
              for o in ('', f'--parent {saved}/raw')]
    assert guards[1]-guards[0]=={'transfer'}

def test_compress_goes_on_and_attacks_from_the_parent(saved, tmp_path, monkeypatch):
    seen = []
    def spy(self, attacks, **kwargs): seen.append(dict(kwargs, attacks=attacks, layers=len(list(self.model.modules()))))
    monkeypatch.setattr(Learner, 'robustness', spy)
    half = dict(prune=.5, epochs=0, eps=.1, progress=False)
    compress(saved/'net', tmp_path/'a', digits_dls, **half)
    compress(saved/'net', tmp_path/'b', digits_dls, **half, escalate=False, budget=99)
    parent,kept = seen[0]['parent'],cnn8(size=8)
    assert [o.shape for o in parent.parameters()]==[o.shape for o in kept.parameters()]     # it is not pruned
    assert seen[0]['escalate'] and seen[0]['attacks']==PGD(.1, steps=20) and 'budget' not in seen[0]
    assert not seen[1]['escalate'] and seen[1]['budget']==99

def test_the_card_of_a_network_that_was_compressed(saved, tmp_path, capsys):
    assert main(['compress', f'{saved}/net', '--out', f'{tmp_path}/small', '--data', 'digits', '--prune', '0.5',
                 '--epochs', '0', '--eps', '0.05', '--no-escalate'])==0
    out,said = capsys.readouterr().out,compressed_info(tmp_path/'small')['report']
    text = (tmp_path/'small'/'README.md').read_text()
    assert 'clean ' in out and f"**{said['verdict']}**: {said['meaning']}." in text and '| 500, digits, test |' in text
    for k in ('clean', 'robust'): assert f"{said[k]:.4f} [{said[f'{k}_ci'][0]:.4f}, {said[f'{k}_ci'][1]:.4f}]" in text
    assert 'transfer' in {o['guard'] for o in said['findings']} and 'stronger ones' not in text

def test_reports_of_older_versions_still_make_a_card(saved):
    record = compressed_info(saved/'net')
    old = dict(clean=.9, robust=.5, clean_ci=.058, robust_ci=.097, n=100, threat=dict(norm='l2', eps=.5, clamp=True),
               attacks=[dict(name='FGSM', settings='FGSM(eps=0.5)')], verdict='upper bound: possible gradient masking',
               reasons=['black_box: finds more'])
    text = card(record | dict(report=old), 1, 2)
    assert '| 100 | 0.9000 ± 0.0580 | 0.5000 ± 0.0970 | l2, eps 0.5 in pixels |' in text
    assert '`FGSM(eps=0.5)`. **upper bound: possible gradient masking**.' in text and '- black_box: finds more' in text
    assert 'stronger ones' in card(record | dict(report=old | dict(escalated=True)), 1, 2)
