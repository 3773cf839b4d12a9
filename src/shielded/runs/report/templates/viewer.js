const viewer = document.getElementById("viewer");
const cards = [...document.querySelectorAll(".cards > li")];
if (viewer && viewer.showModal) {
  const find = selector => viewer.querySelector(selector);
  const make = (tag, name = "", text = "") => Object.assign(document.createElement(tag), { className: name, textContent: text });
  const [slider, stage, beside] = ["input", ".stage", ".beside"].map(find);
  const [below, above, neighbour] = [make("img", "below"), make("img", "above"), make("img")];
  stage.append(below, above);
  beside.prepend(neighbour);
  let at = 0;

  const show = (target, source) => {
    target.hidden = !source;
    if (!source) return;
    target.src = source.src;
    target.alt = source.alt;
    if (source.dataset.file) {  // the whole picture, if its file is beside the page
      const whole = new Image();
      whole.onload = () => { if (target.alt === source.alt) target.src = whole.src; };
      whole.src = source.dataset.file;
    }
  };
  const line = figure => {
    const text = make("p");
    text.append(...figure.querySelector("figcaption").cloneNode(true).childNodes);
    text.firstChild.after(" ");
    return text;
  };
  const cut = share => {
    slider.value = share;
    above.style.clipPath = `inset(0 0 0 ${slider.value}%)`;  // left of the edge the model's own picture
    stage.style.setProperty("--edge", `${slider.value}%`);
  };
  const open = index => {
    at = (index + cards.length) % cards.length;
    const card = cards[at];
    const figures = [...card.querySelectorAll("figure")];
    const of = label => figures.find(figure => figure.querySelector("b").textContent === label);
    const picture = figure => figure && figure.querySelector("img");
    const pair = [of("without SPELL"), of("with SPELL")];
    const [before, after] = pair.map(picture);
    const single = !before || !after;
    show(below, before && after ? before : before || after);
    show(above, single ? null : after);
    stage.classList.toggle("single", single);
    find(".slider").hidden = find(".swap").hidden = find(".keys").hidden = single;
    if (!single) cut(slider.value);
    const other = figures.find(figure => !pair.includes(figure));
    beside.hidden = !other;
    if (other) {
      show(neighbour, picture(other));
      beside.querySelector("figcaption").replaceChildren(line(other));
    }
    find("h2").textContent = card.querySelector(".open").getAttribute("aria-label").replace("Compare ", "");
    const badge = card.querySelector(".badge");
    find(".badge").hidden = !badge;
    find(".badge").textContent = badge ? badge.textContent : "";
    find(".figures").replaceChildren(...pair.filter(Boolean).map(line));
    const reasons = card.querySelector(".reasons");
    find(".reasons").textContent = reasons ? reasons.textContent : "";
    if (!viewer.open) viewer.showModal();
    if (!single) slider.focus();
  };
  const swap = () => cut(slider.value > 50 ? 0 : 100);
  const drag = event => {
    const box = stage.getBoundingClientRect();
    if (event.buttons && !above.hidden) cut(Math.min(100, Math.max(0, 100 * (event.clientX - box.left) / box.width)));
  };

  document.documentElement.classList.add("can-open");  // shows the buttons
  document.querySelector("main").addEventListener("click", event => {
    const card = event.target.closest(".cards > li");
    if (card && event.target.closest(".open, .figures")) open(cards.indexOf(card));
  });
  slider.addEventListener("input", () => cut(slider.value));
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  find(".previous").addEventListener("click", () => open(at - 1));
  find(".next").addEventListener("click", () => open(at + 1));
  find(".swap").addEventListener("click", swap);
  find(".close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => cards[at].querySelector(".open").focus());
  viewer.addEventListener("keydown", event => {
    const key = event.key.toLowerCase();
    const act = { n: () => open(at + 1), p: () => open(at - 1) }[key];
    if (act) act();
    else if (key === " " && event.target === slider && !above.hidden) swap();
    else return;
    event.preventDefault();
  });
}
