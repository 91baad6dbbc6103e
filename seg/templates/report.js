// Without it, tables keep their order and all predictions are shown.
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows], headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const isNumber = header.classList.contains("number"), text = row => row.cells[column].textContent;
    const orders = isNumber ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    header.firstChild.onclick = () => {
      const order = orders[(orders.indexOf(header.getAttribute("aria-sort")) + 1) % 3];
      const sign = order === "ascending" ? 1 : -1;
      const number = row => isNaN(parseFloat(text(row))) ? sign * Infinity : parseFloat(text(row)); // missing ones last
      const compare = (a, b) => isNumber ? number(a) - number(b) : text(a).localeCompare(text(b));
      headers.forEach(other => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      table.tBodies[0].append(...(order === "none" ? rows : [...rows].sort((a, b) => sign * compare(a, b))));
    };
  });
}
const samples = [...document.querySelectorAll("article")], controls = document.querySelector(".controls");
if (controls) {
  const [previous, next, choice] = controls.children;
  const show = index => {
    choice.selectedIndex = (index + samples.length) % samples.length;
    samples.forEach((sample, other) => { sample.hidden = other !== choice.selectedIndex; });
  };
  choice.onchange = () => show(choice.selectedIndex);
  previous.onclick = () => show(choice.selectedIndex - 1);
  next.onclick = () => show(choice.selectedIndex + 1);
  controls.hidden = false;
  show(0);
}
