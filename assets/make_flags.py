"""Make `flags.tar` from the npm package svg-country-flags 1.2.10 (public-domain flags).

Usage: npm pack svg-country-flags@1.2.10, unpack it, then
    python assets/make_flags.py package/png100px assets/flags.tar
One sample per sovereign state (UN members and observers, Kosovo, Taiwan) in the unpacked
WebDataset layout: a PNG and three questions.  Left out: Chad and Monaco, whose flags look like
those of Romania and Indonesia.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CONTINENTS = {
    "Africa": "dz Algeria,ao Angola,bj Benin,bw Botswana,bf Burkina Faso,bi Burundi,cm Cameroon,"
              "cv Cape Verde,cf Central African Republic,km Comoros,cg Congo,cd DR Congo,"
              "ci Ivory Coast,dj Djibouti,eg Egypt,gq Equatorial Guinea,er Eritrea,sz Eswatini,"
              "et Ethiopia,ga Gabon,gm Gambia,gh Ghana,gn Guinea,gw Guinea-Bissau,ke Kenya,"
              "ls Lesotho,lr Liberia,ly Libya,mg Madagascar,mw Malawi,ml Mali,mr Mauritania,"
              "mu Mauritius,ma Morocco,mz Mozambique,na Namibia,ne Niger,ng Nigeria,rw Rwanda,"
              "st Sao Tome and Principe,sn Senegal,sc Seychelles,sl Sierra Leone,so Somalia,"
              "za South Africa,ss South Sudan,sd Sudan,tz Tanzania,tg Togo,tn Tunisia,ug Uganda,"
              "zm Zambia,zw Zimbabwe",
    "Asia": "af Afghanistan,am Armenia,az Azerbaijan,bh Bahrain,bd Bangladesh,bt Bhutan,bn Brunei,"
            "kh Cambodia,cn China,cy Cyprus,ge Georgia,in India,id Indonesia,ir Iran,iq Iraq,"
            "il Israel,jp Japan,jo Jordan,kz Kazakhstan,kw Kuwait,kg Kyrgyzstan,la Laos,lb Lebanon,"
            "my Malaysia,mv Maldives,mn Mongolia,mm Myanmar,np Nepal,kp North Korea,om Oman,"
            "pk Pakistan,ps Palestine,ph Philippines,qa Qatar,sa Saudi Arabia,sg Singapore,"
            "kr South Korea,lk Sri Lanka,sy Syria,tw Taiwan,tj Tajikistan,th Thailand,"
            "tl East Timor,tr Turkey,tm Turkmenistan,ae United Arab Emirates,uz Uzbekistan,"
            "vn Vietnam,ye Yemen",
    "Europe": "al Albania,ad Andorra,at Austria,by Belarus,be Belgium,ba Bosnia and Herzegovina,"
              "bg Bulgaria,hr Croatia,cz Czechia,dk Denmark,ee Estonia,fi Finland,fr France,"
              "de Germany,gr Greece,hu Hungary,is Iceland,ie Ireland,it Italy,xk Kosovo,lv Latvia,"
              "li Liechtenstein,lt Lithuania,lu Luxembourg,mt Malta,md Moldova,me Montenegro,"
              "nl Netherlands,mk North Macedonia,no Norway,pl Poland,pt Portugal,ro Romania,"
              "ru Russia,sm San Marino,rs Serbia,sk Slovakia,si Slovenia,es Spain,se Sweden,"
              "ch Switzerland,ua Ukraine,gb United Kingdom,va Vatican City",
    "North America": "ag Antigua and Barbuda,bs Bahamas,bb Barbados,bz Belize,ca Canada,"
                     "cr Costa Rica,cu Cuba,dm Dominica,do Dominican Republic,sv El Salvador,"
                     "gd Grenada,gt Guatemala,ht Haiti,hn Honduras,jm Jamaica,mx Mexico,"
                     "ni Nicaragua,pa Panama,kn Saint Kitts and Nevis,lc Saint Lucia,"
                     "vc Saint Vincent,tt Trinidad and Tobago,us United States",
    "Oceania": "au Australia,fj Fiji,ki Kiribati,mh Marshall Islands,fm Micronesia,nr Nauru,"
               "nz New Zealand,pw Palau,pg Papua New Guinea,ws Samoa,sb Solomon Islands,to Tonga,"
               "tv Tuvalu,vu Vanuatu",
    "South America": "ar Argentina,bo Bolivia,br Brazil,cl Chile,co Colombia,ec Ecuador,gy Guyana,"
                     "py Paraguay,pe Peru,sr Suriname,uy Uruguay,ve Venezuela",
}
PALETTE = {"red": (205, 20, 40), "green": (0, 125, 65), "blue": (0, 50, 145), "white": (255,) * 3,
           "black": (0,) * 3, "yellow": (253, 210, 20), "orange": (250, 120, 20),
           "light blue": (110, 180, 230)}


def colours(image: Image.Image) -> str:
    """Names of the colours that fill at least a tenth of the flag, largest first."""
    pixels = np.asarray(image.convert("RGBA"), dtype=np.int64).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 128, :3]
    distance = np.abs(pixels[:, None] - np.array(list(PALETTE.values()))).sum(-1)
    share = np.bincount(distance.argmin(1), minlength=len(PALETTE)) / len(pixels)
    names = [name for i, name in enumerate(PALETTE) if share[i] >= 0.1]
    return ", ".join(sorted(names, key=lambda n: -share[list(PALETTE).index(n)]))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time, no owner: the same bytes every time
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    states = sorted((entry.split(" ", 1) + [continent] for continent, entries in CONTINENTS.items()
                     for entry in entries.split(",")))
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (code, country, continent) in enumerate(states):
            content = (folder / f"{code}.png").read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                answers = country, continent, colours(image)
            asked = ("<image>\nWhich country has this flag?", "Which continent is it in?",
                     "Which colours does the flag have?")
            texts = [{"role": role, "content": text} for question, answer in zip(asked, answers)
                     for role, text in (("user", question), ("assistant", answer))]
            sample = {"texts": texts, "media": "image", "name": [f"0_{code}.png"]}
            add(tar, f"image_{i:03d}.0_{code}.png", content)
            add(tar, f"image_{i:03d}.json", json.dumps(sample, ensure_ascii=False).encode())
    print(f"{out}: {len(states)} flags")


if __name__ == "__main__":
    main()
