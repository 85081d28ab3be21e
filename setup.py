"""Requirements, extras and console programs live in settings.ini; everything static in pyproject.toml."""
from configparser import ConfigParser
from setuptools import find_namespace_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]

setup(
    packages=find_namespace_packages(include=["blip3o_nb*"]),
    package_data={"blip3o_nb": s["package_data"].split()},
    install_requires=s["requirements"].split(),
    extras_require={k: s[f"{k}_requirements"].split() for k in ("dev", "trackers", "peers")},
    classifiers=[c.strip() for c in s["classifiers"].splitlines() if c.strip()],
    entry_points={"console_scripts": s["console_scripts"].split(),
                  "nbdev": ["blip3o_nb=blip3o_nb._modidx:d"]},
)
