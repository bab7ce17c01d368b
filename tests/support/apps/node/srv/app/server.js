const path = require('path');
const express = require('express');
const ejs = require('ejs');
const _ = require('lodash');
const moment = require('moment');

const app = express();
app.set('views', path.join(__dirname, 'views'));
app.engine('ejs', ejs.__express || ejs.renderFile);

app.get('/', (request, response) => {
  const articles = _.chain(_.range(1, 200)).filter((n) => n % 7 === 0).map((n) => `article ${n}`).value();
  const day = moment.utc(0).format('dddd, MMMM Do YYYY');
  response.render('home.ejs', { articles, day, release: '@RELEASE@' });
});

app.listen(18084, '127.0.0.1');
